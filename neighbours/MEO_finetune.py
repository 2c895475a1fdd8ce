"""6a  A dense model against the same with several experts, as a vanilla MoE and as MEO: score, FLOPs, time, memory.

Reads   MODEL_PATH, or for the docstring tasks a small model that is pre-trained here first; the task's data from
        TASKS_PATH/{task}/{train,validation,test}.jsonl, lines {"text", "label"} and for pairs "text2"; or from the hub,
        GLUE_PATH, WIKITEXT_PATH, SQUAD_PATH, XSUM_PATH; or from the docstrings of the installed packages.
Writes  MEO_DIR/{family}_{task}/seed{seed}/{variant}.json, a record a run, and from these the table and the figures in
        MEO_DIR/{family}_{task}/report; of several tasks the same of all together, with intervals and the claims' verdicts, in
        MEO_DIR/{family}_{a+b+c}. MEO_DIR/bases/{family}, the small pre-trained model.
Takes   at tiny about half a minute a run on one CPU core, and pre-training three minutes; at real (MiniLM on four tasks, 120
        runs) some four hours of one core. Interrupted, it goes on; what has been run is not run again.

GLUE's and SQuAD's test answers are not public: their published validation split is the test here, and the epoch is chosen on
a tenth of the training set, held out (of SQuAD whole passages). Inputs longer than input_length lose their end.
"""

from expert_merging.core.scales import by_scale
from expert_merging.run.constants import run

family = "bert"  # bert | gpt2 | t5 | bart
tasks = by_scale(  # in TASKS_PATH; GLUE's cola .. wnli, wikitext, squad, xsum; doc_topic, doc_lm, doc_qa, doc_summary
    paper=("sst2",), night=("doc_topic",), tiny=("doc_topic",), real=("sst2", "mrpc", "trec", "subj")
)  # one or several, of several also the average and the claims
n = by_scale(paper=0, night=8, tiny=8)  # experts in place of each FFN linear; 0 takes the task's own: GLUE's 16, else 8
ks = by_scale(
    paper=(0,), night=(1, 2, 4), tiny=(1, 2, 4), real=(2, 4)
)  # of them active; 0: the task's own, GLUE's 12, SQuAD's 8, else 2
levels = by_scale(
    paper=("own",), night=("sequence", "token"), tiny=("sequence", "token")
)  # task | sequence | token: what shares a gate (gpt2: task, token); own: task for GLUE and WikiText, else sequence
seeds = (0, 1, 2)
MODEL_PATH = by_scale(
    paper="", night="", tiny="", real="models/minilm-l6"
)  # hub name or folder, for all tasks; nothing takes the task's own (expert_merging/meo/recipes.py)
TASKS_PATH = ""  # folder with a folder a task
GLUE_PATH = "nyu-mll/glue"  # hub name, or a folder with a folder a task: train and validation as .jsonl, .csv, .parquet
WIKITEXT_PATH = "Salesforce/wikitext"  # hub name, or a folder with wikitext-2-raw-v1/: train, validation, test
MEO_DIR = "{RUN_DIR}/meo"
learning_rate = (0.0,)  # at the start; 0 takes the task's own. Of several the best on validation counts, run by run
epochs = 0  # the best on validation is kept; 0 takes the task's own, as for the next two
train_batch = 0  # sequences a step
input_length = 0  # tokens; longer inputs are cut

# of a task in TASKS_PATH, 0 takes all
task_train = 400  # training examples that each seed draws for itself
task_validation = 200  # that choose the epoch, the same for all
task_test = 600  # the same for all

# the small models of the docstring tasks, and their pre-training
d_model = by_scale(paper=128, night=256, tiny=64)
d_ff = by_scale(paper=512, night=1024, tiny=256)
num_layers = by_scale(paper=2, night=4, tiny=2)  # in a stack
num_heads = by_scale(paper=4, night=8, tiny=4)
pretraining_steps = by_scale(paper=1500, night=20000, tiny=1500)
pretraining_batch = by_scale(paper=32, night=128, tiny=32)  # blocks a step
pretraining_length = 64  # tokens a block
pretraining_lr = 3e-3  # peak

publish = False  # of several tasks: copy records, tables and figures to results/meo/{scale}

_instead = {  # of global_config.py, which have no say here
    "lr": "learning_rate", "num_epochs": "epochs", "batch_size": "train_batch", "train_sample": "task_train",
    "weight_decay": "the task's own (expert_merging/meo/recipes.py)",
}  # fmt: skip


def main(c):
    from pathlib import Path

    from expert_merging.meo import comparison

    jobs = comparison.jobs_of(c)

    from transformers.utils import logging

    from expert_merging.meo import bases, report
    from expert_merging.run.devices import make_accelerator

    logging.set_verbosity_error()  # it would say of every model that its head is new
    if c.publish:
        report.check_publishing(c)
    raw = comparison.check(c, jobs)
    accelerator = make_accelerator(c)

    found = {}
    for job in jobs:
        # A small model, pre-trained on docstrings, where the task has no published one.
        base = job.model or bases.pretrain_once(c, accelerator, Path(c.MEO_DIR) / "bases" / c.family)
        found[job.task] = comparison.run_job(c, accelerator, job, base, raw[job.task])

    if accelerator.is_main_process:
        for task, records in found.items():
            print(report.write_finetuning(records, Path(c.MEO_DIR) / f"{c.family}_{task}" / "report"))
        if len(found) > 1:
            print(report.write_together(c, found))


if __name__ == "__main__":
    run(main, globals())
