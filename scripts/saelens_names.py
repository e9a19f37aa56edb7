"""Write gemmascope_fast/checkpoints/data/saelens_names.json out of the SAELens wheel's pretrained_saes.yaml.

    pip download --no-deps sae-lens -d DIR && python scripts/saelens_names.py DIR/sae_lens-*.whl

The table maps SAELens's release and SAE names to Hugging Face repositories and folders, for the formats that this
package reads.  SAELens is MIT-licensed (Copyright (c) 2023 Joseph Bloom); the table says so itself.
"""

import argparse
import json
import zipfile
from pathlib import Path

import yaml

OUT = Path(__file__).parents[1] / "gemmascope_fast" / "checkpoints" / "data" / "saelens_names.json"
# SAELens's loaders whose files this package reads; None is SAELens's own format
FORMATS = {
    "gemma_2": "gemma-scope-1",
    "gemma_2_transcoder": "gemma-scope-1",
    "gemma_3": "gemma-scope-2",
    None: "saelens",
    "qwen_scope": "qwen-scope",
    "llama_scope": "llama-scope",
    "llama_scope_r1_distill": "llama-scope",
    "goodfire": "goodfire",
    "deepseek_r1": "goodfire",
    "dictionary_learning_1": "dictionary-learning",
    "mwhanna_transcoder": "circuit-tracer",
    "temporal": "temporal",  # refused by name
}


def table(wheel: Path) -> dict:
    with zipfile.ZipFile(wheel) as archive:
        releases = yaml.safe_load(archive.read("sae_lens/pretrained_saes.yaml"))
        info = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    found = {}
    for name, release in sorted(releases.items()):
        overrides = release.get("config_overrides") or {}
        if release.get("conversion_func") not in FORMATS or overrides.get("normalize_activations", "none") != "none":
            continue  # activations normalised at run time are not computed here
        saes = release["saes"]
        # most paths are a common prefix and the id: only the others are spelled out
        prefix = common_prefix(saes)
        entry = {
            "repo": release["repo_id"],
            "model": release["model"],
            "format": FORMATS[release.get("conversion_func")],
            "prefix": prefix,
            "ids": [sae["id"] for sae in saes],
            "paths": {s["id"]: str(s["path"]) for s in saes if str(s["path"]) != prefix + s["id"]},
            "neuronpedia": {s["id"]: s["neuronpedia"] for s in saes if s.get("neuronpedia")},
            "scale": {s["id"]: s["norm_scaling_factor"] for s in saes if s.get("norm_scaling_factor")},
        }
        found[name] = {key: value for key, value in entry.items() if value}
    source = f"pretrained_saes.yaml of {info.split('.dist-info')[0]}, MIT License, Copyright (c) 2023 Joseph Bloom"
    return {"source": source, "releases": found}


def common_prefix(saes: list[dict]) -> str:
    prefixes = {str(s["path"]).removesuffix(s["id"]) for s in saes if str(s["path"]).endswith(s["id"])}
    return prefixes.pop() if len(prefixes) == 1 else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    made = table(parser.parse_args().wheel)
    lines = [f" {json.dumps(name)}: {json.dumps(entry)}" for name, entry in made["releases"].items()]
    head = f'{{"source": {json.dumps(made["source"])},\n"releases": {{\n'
    OUT.write_text(head + ",\n".join(lines) + "\n}}\n")
    print(f"{OUT}: {len(lines)} releases, {sum(len(e['ids']) for e in made['releases'].values())} SAEs")


if __name__ == "__main__":
    main()
