"""Models of the released code, to go on with here: measured anew, merged, compared, evaluated.

Reads   released_folder: `single_task_{task_type}.pt`, or `{released_run}_ep{epoch}.pt`, and the .pkl beside it if there is
        one; DATA_DIR/{task} (datasets_preprocessing.py); and BASE_MODEL_PATH, the pre-trained model it was fine-tuned from.
Writes  what single_task_finetune.py, or the multi-task scripts, would: a model folder, and a history with scores on
        validation and test and the usage of experts, all measured here, and the released history under "released".
Takes   as long as decoding validation and test.
"""

from expert_merging.run.constants import run

released_folder = ""  # where the released code left its .pt and .pkl files
task_type = "squad"  # of a single-task model: ag_news | squad | xsum
num_expert = 8  # experts in each sparse layer of a single-task model
released_run = ""  # of a multi-task model its name, as Baseline_[8] or CAEM_[8|16]; empty: a single-task model
epoch = 0  # of a multi-task model: which of its files


def main(c):
    from pathlib import Path

    from expert_merging.core.errors import UserError
    from expert_merging.run import results
    from expert_merging.switch.models import preflight

    experts = c.num_expert
    if c.released_run:
        _, few, many = results.parse_run_name(c.released_run)
        experts = many or few
    preflight(c, c.task_types if c.released_run else [c.task_type], experts)
    if not Path(c.released_folder).is_dir() or not c.released_folder:
        raise UserError(f"released_folder is {c.released_folder!r}; name the folder with the released code's .pt files")

    from expert_merging.run.devices import make_accelerator
    from expert_merging.training import imports

    accelerator = make_accelerator(c)
    released = imports.find(c, experts)
    if results.is_done(released.history, released.identity, again="import"):
        return

    # The weights, and whether they can come from that pre-trained model.
    model, kinship = imports.load(released)
    accelerator.print(
        f"{released.weights}: median distance {kinship['distance']}, {kinship['untouched']} tensors untouched"
    )

    # Scores and usage are measured here, as after an epoch of training.
    history = imports.measure(c, accelerator, released, model)
    imports.save(accelerator, released, model, history | {"kinship": kinship})


if __name__ == "__main__":
    run(main, globals())
