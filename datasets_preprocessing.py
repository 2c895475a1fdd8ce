"""1  Raw examples -> seq2seq features on disk.

Reads   AG_NEWS_PATH, SQUAD_PATH, XSUM_PATH (hub names, or folders with the published files) or, for the doc_ tasks, the
        docstrings of the installed packages; the tokenizer of BASE_MODEL_PATH.
Writes  DATA_DIR/{task}: token ids, unpadded, cut at max_input_length and max_decoder_length, with complete.json, which
        says what they were made from; DATA_DIR/lengths.png; and prints a table of the lengths.
Takes   at tiny a minute or two; at paper about 20 minutes on one core after the download. What is there already is not
        made again.
"""

from expert_merging.run.constants import run

num_expert = 8  # of the base model whose tokenizer is used; the one with 16 experts has the same


def main(c):
    from pathlib import Path

    from expert_merging.core import files, hub
    from expert_merging.data import features
    from expert_merging.data.tasks import get_task

    # What can be found wrong without reading any data.
    tasks = {name: get_task(name) for name in c.task_types}
    features.check_constants(c)
    base = c.BASE_MODEL_PATH.format(experts=c.num_expert)
    paths = {"BASE_MODEL_PATH": base, **features.source_paths(c, tasks)}
    if None in [hub.local_folder(path, constant) for constant, path in paths.items()]:
        hub.offline_if_unreachable()
    tokenizer = hub.load_tokenizer(base)

    import datasets

    manifests = {name: features.is_complete(name, c, tokenizer) for name in tasks}
    missing = [name for name in tasks if manifests[name] is None]
    if missing:
        files.hold(c.DATA_DIR)
    # All raw examples are read, and so checked, before the first are tokenised.
    raw = {name: tasks[name].load(c) for name in missing}
    datasets.disable_progress_bars()  # its bars of saving would stand between ours
    for name in missing:
        manifests[name] = features.prepare(name, c, tokenizer, raw.pop(name))
        print(f"wrote {features.folder_of(name, c)}")

    from expert_merging.report.lengths import length_histogram, length_table

    figure = Path(c.DATA_DIR) / "lengths.png"
    if missing or not figure.exists():
        length_histogram({name: features.load(name, c, tokenizer) for name in tasks}, c, figure)
        print(f"wrote {figure}")
    else:
        print(f"all of it is in {c.DATA_DIR} already, whole; remove a task's folder to make it again")
    print(length_table(manifests))


if __name__ == "__main__":
    run(main, globals())
