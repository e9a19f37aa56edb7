"""The part of attach that is specific to Hugging Face transformers: model structure, hooks, generate."""
