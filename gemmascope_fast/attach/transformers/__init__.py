"""The part of attach that knows Hugging Face transformers: structure of a model, hooks, generate."""
