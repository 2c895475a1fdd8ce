"""Two finished runs side by side: their soup, the losses on the line between them, and their layers' likeness (CKA).

Reads   DATA_DIR/{task}; the runs' histories in PICKLE_PATH and models in MODEL_SAVE_PATH, for CKA also the models they
        began with: {name}_merged there, or the pre-trained model in BASE_MODEL_PATH; for soups the single-task histories
        in SOURCE_PICKLE_PATH, by which Overall is measured.
Writes  PICKLE_PATH/pairs/{first}__{second}.json.
Takes   at tiny about a minute on 2 CPU cores. Interrupted, it goes on with the measure it was at.
"""

from expert_merging.run.constants import run

first = "CAEM_[8|8]"  # a finished run: {current_case_name}_[{experts}] or ..._[{source experts}|{target experts}]
second = "Baseline_[8]"  # another one; with other numbers of experts for cka only
measures = ("soup", "line", "cka")  # soup | line | cka
line_points = 5  # between the two ends of the line
cka_examples = 0  # of each task's validation; 0 takes all


def main(c):
    from pathlib import Path

    from expert_merging.analysis import comparison
    from expert_merging.run import results
    from expert_merging.switch.models import find_base, preflight

    comparison.check_constants(c)
    preflight(c, c.task_types)
    pasts = [comparison.history_of(c, name) for name in (c.first, c.second)]
    for past in pasts:
        if "cka" in c.measures and "ancestor" in past["identity"]:
            find_base(c, past["experts_num"])

    from expert_merging.run.devices import make_accelerator

    # Both runs, checked to fit together.
    accelerator = make_accelerator(c)
    pair = comparison.open_pair(c, pasts)
    path = Path(c.PICKLE_PATH) / "pairs" / f"{results.pair_name(c.first, c.second)}.json"
    work = path.with_suffix(".run.json")
    if results.is_done(path, pair.identity, work, again="compare"):
        return

    # The soup of both, the losses on the line between them, the CKA of their layers before and after fine-tuning.
    found = comparison.measure(c, accelerator, pair, work)
    if accelerator.is_main_process:
        results.save(path, pair.identity, {"seconds": 0, "first": c.first, "second": c.second} | found)
        work.unlink()
    for line in comparison.lines((c.first, c.second), found):
        accelerator.print(line)


if __name__ == "__main__":
    run(main, globals())
