"""What the released scripts pickle of a run, in their shapes, for programs that read those files."""

from typing import Any

PAPER_TASKS = ("ag_news", "squad", "xsum")  # whose lists the released closing lines read, trained on or not
_ENDINGS = {"encoder": "", "decoder": "_de"}
_ZERO = 0.0001  # what stands for a score of 0 there, since scores are divided by one another


def as_released(
    history: dict[str, Any], usage: list[dict[str, dict[str, Any]]], goals: dict[str, dict[str, float]] | None
) -> dict[str, Any]:  # fmt: skip
    """The content of a .pkl file of the released code.

    Args:
        history: a run's record, as in its JSON file.
        usage: of each epoch, {task: {stack: [sparse layer][expert]}}.
        goals: {split: {task: score of the single-task model}}; of a merged model they stand before its epochs.

    Returns:
        `{task}_data`: the main score of each epoch, from 0 to 1 (of the test split where every epoch was tested, else of
        validation: `scores_of` says which; for a merged model the single-task model's score comes first);
        `expert_usage_grid` and `_de`: of each epoch [sparse layer][expert] shares over all tasks; of a merged model
        `record_stay_num_experts_en` and `_de`: [sparse layer][source] experts. Beside these, which the released code does
        not have: `entropy` and `entropy_de`, {task: normalised entropy of each sparse layer} of the best epoch.
    """
    tested = all(history[f"{task}_data"]["test_epochs"] for task in history["tasks"])
    key, split = ("test_epochs", "test") if tested else ("validation", "validation")
    merged = "allocation" in history
    released: dict[str, Any] = {f"{task}_data": [] for task in PAPER_TASKS} | {"scores_of": split}
    for task in history["tasks"]:
        of_task = history[f"{task}_data"]
        scores = [epoch[of_task["main_score"]] for epoch in of_task[key]]
        if merged and goals:
            scores.insert(0, goals[split][task])
        released[f"{task}_data"] = [score / 100 or _ZERO for score in scores]
    for stack, entropy in history["entropy"].items():
        ending = _ENDINGS[stack]
        released[f"expert_usage_grid{ending}"] = [_shares(epoch, stack) for epoch in usage]
        released[f"entropy{ending}"] = entropy
    for stack, counts in history["allocation"].items() if merged else ():
        released[f"record_stay_num_experts_{stack[:2]}"] = counts
    return released


def _shares(usage: dict[str, dict[str, Any]], stack: str) -> list[list[float]]:
    """Each expert's share of a sparse layer's tokens, over all tasks; 0 where there was none."""
    layers = zip(*(of_task[stack] for of_task in usage.values()), strict=True)
    totals = [[sum(tokens) for tokens in zip(*layer, strict=True)] for layer in layers]
    return [[tokens / (sum(layer) or 1) for tokens in layer] for layer in totals]
