"""7  HEMoE: a dense LLaMA-style model (Llama, Mistral, Qwen2) becomes a mixture of experts of different sizes.

Reads   base_model; INSTRUCTIONS_PATH/{task}.jsonl, lines {"instruction": ..., "output": ...}, or RAW_PATH to make them of;
        the tasks `eval_tasks`, which lm_eval knows by name or as YAML files in EVAL_TASKS_PATH. The steps data and base
        make all three at the scales tiny and night. At real: SmolLM2-135M (tools/packaged_model.py), your instructions or
        raw data, and QUESTIONS_PATH.
Writes  HEMOE_DIR/seed{seed}/: domains.json, scores.npz, and for each of `methods` a folder with split.npz, the routers to
        begin with in model/, the mixture in tuned/ (it loads alone), measure.json and evaluation.json; HEMOE_DIR/report:
        tables, figure, records.
Takes   at tiny about ten minutes a seed on one CPU core, at real a night. Interrupted, it goes on. Steps run alone:
        --steps partition report.
"""

from expert_merging.core.scales import by_scale
from expert_merging.run.constants import run

steps = ("data", "base", "domains", "scores", "partition", "conversion", "tuning", "measure", "evaluation", "report")
methods = (
    "HEMoE",
    "HEMoE_start",  # routers start from the domains' map
    "HEMoE_gate",  # EMoE's routers, not trained
    "HEMoE_modules",  # over pre-clustered modules
    "HEMoE_equal",  # size_ratio 1
    "MoEfication",
    "MoEBERT",
    "MoEBERT_domains",
    "random",
    "random_heterogeneous",  # of HEMoE's sizes
    "EMoE",
)  # how neurons are split; also parts (PARTS_PATH), HEMoE_noise (routers), HEMoE_tasks, HEMoE_tfidf (domains from these)

HEMOE_DIR = "{RUN_DIR}/hemoe"
base_model = by_scale(
    paper="meta-llama/Llama-3.2-1B",
    night="{HEMOE_DIR}/seed{seed}/base",
    tiny="{HEMOE_DIR}/seed{seed}/base",
    real="models/smollm2-135m",
)  # hub name or local folder
INSTRUCTIONS_PATH = "{HEMOE_DIR}/data/train"  # folder of {task}.jsonl, or of the released {task}_template/train.json
RAW_PATH = ""  # raw data to make instructions of: hub, or a folder of {task}/train.jsonl; "" leaves them as they are
raw_tasks = ("all",)  # of RAW_PATH; all: those in the folder, or from the hub the 26 of the paper
raw_examples = 5000  # rows a task, a fixed sample; 0 takes all
with_options = True  # instructions list the answers to choose from: the authors' do for the domains, not for tuning
every_template = False  # each row in every template, not in one that is drawn: the authors' "enhance"
EVAL_TASKS_PATH = by_scale(
    paper="", night="{HEMOE_DIR}/data/eval", tiny="{HEMOE_DIR}/data/eval"
)  # folder of lm_eval task files; "" for lm_eval's own alone

QUESTIONS_PATH = ""  # at real: folder of {task}/test.jsonl, {"question", "choices", "answer"}; "" asks about docstrings
eval_questions = by_scale(paper=0, night=0, tiny=0, real=100)  # of these a task, a fixed sample; 0 takes all
PARTS_PATH = ""  # of the method parts: a folder of the released {layer}.part.{experts} files

# -- domains and importance
domains_from = by_scale(paper="clusters", night="tasks", tiny="tasks", real="clusters")  # tasks | clusters
num_domains = by_scale(paper=8, night=6, tiny=6, real=8)  # D
embedder = by_scale(
    paper="tfidf", night="tfidf", tiny="tfidf", real="models/minilm-l6"
)  # of clusters: tfidf, or the local folder of an encoder
held_out = by_scale(paper=100, night=100, tiny=40, real=15)  # examples a task that measure and nothing else sees
task_examples = by_scale(paper=0, night=0, tiny=0, real=400)  # of a task besides, for domains and tuning; 0 takes all
score_sequences = by_scale(paper=5000, night=1000, tiny=200, real=100)  # a domain
score_sums = "float64"  # float64 | bfloat16: the released code's, which stop growing
max_tokens = by_scale(
    paper=1024, night=128, tiny=64, real=192
)  # of an instruction with its output, in scoring and tuning

prompts = by_scale(
    paper="plain", night="plain", tiny="plain", real="chat"
)  # plain | chat: the tokenizer's template, in scoring, tuning and held-out loss (the authors'); lm_eval's questions are plain

# -- partition
num_experts = by_scale(paper=8, night=6, tiny=6, real=8)  # n
size_ratio = 4.0  # R: the largest expert over the smallest
experts_per_domain = 2.0  # l, in units of n / D
num_modules = by_scale(
    paper=128, night=128, tiny=32, real=128
)  # of HEMoE_modules: groups of neurons that stay together
solver = "alternating"  # alternating | highs | gurobi
solver_starts = 16
solver_seconds = 60.0  # a layer, at most
rounding = "exact"  # exact | released: the authors' roundings of sizes

# -- the mixture
moe_layers = by_scale(
    paper=tuple(range(3, 15)), night=(0, 1, 2, 3, 4, 5), tiny=(0, 1, 2, 3), real=tuple(range(3, 27))
)  # from 0; others stay dense
router_k = by_scale(paper=4, night=0, tiny=0, real=4)  # experts that fire in tuning; 0 draws 1..n anew for each step
router_start = by_scale(
    paper="noise", night="noise", tiny="noise", real="gate"
)  # of learned routers: noise of router_std | gate: EMoE's, the mean gate of an expert, from which some tens of steps get on
router_std = 1e-3
balance_coef = 0.1  # lambda of the size-weighted balance loss; the released code has 5e-4, times the tokens
balance_scale = "experts"  # experts: times n | tokens: times the tokens of a batch (released)
balance_padding = False  # whether padding counts (released: it does)

# -- tuning: LoRA on attention, routers in full
lora_rank = 8
lora_alpha = 16
lora_dropout = 0.05
tune_tasks = ("all",)  # all: one model, of every task's examples; names: a model for each of these, as the authors'
tune_steps = by_scale(paper=2000, night=1000, tiny=50, real=30)
tune_batch = by_scale(paper=16, night=32, tiny=16, real=4)  # examples in one forward pass
tune_accumulation = by_scale(paper=2, night=1, tiny=1, real=4)  # passes a step
tune_lr = by_scale(paper=3e-4, night=1e-3, tiny=3e-3)  # cosine to tune_last_lr of it
tune_last_lr = 0.1
tune_warmup = 0.05  # share of the steps
save_dtype = "float32"  # float32 | bfloat16: of tuned/, and so of what is measured

# -- evaluation
eval_tasks = by_scale(
    paper=("arc_easy", "arc_challenge", "piqa", "openbookqa", "winogrande", "sciq", "social_iqa"),
    night=("doc_topic", "doc_type", "doc_default", "doc_summary", "doc_next", "doc_order"),
    tiny=("doc_topic", "doc_type", "doc_default", "doc_summary", "doc_next", "doc_order"),
    real=("all",),
)  # 0-shot; all: those in EVAL_TASKS_PATH
eval_examples = 0  # a task; 0 takes all
eval_ks = by_scale(paper=(0,), night=(0,), tiny=(0,), real=(3, 4, 5))  # experts that fire; 0 takes 1..n

before_k = by_scale(
    paper=0, night=0, tiny=0, real=4
)  # that fire in the mixtures before tuning; 0 leaves those unmeasured

# -- the dense model of the scales tiny and night, and its data
doc_train_examples = by_scale(paper=0, night=8000, tiny=4000, real=4000)  # a task
doc_test_examples = by_scale(paper=0, night=300, tiny=50, real=200)  # a task
base_vocab_size = by_scale(paper=0, night=8192, tiny=2048)
base_hidden_size = by_scale(paper=0, night=256, tiny=64)
base_intermediate_size = by_scale(paper=0, night=1024, tiny=256)  # neurons of an FFN
base_layers = by_scale(paper=0, night=6, tiny=4)
base_heads = by_scale(paper=0, night=8, tiny=4)
base_tokens = by_scale(paper=0, night=128, tiny=64)
base_steps = by_scale(paper=0, night=10000, tiny=600)
base_batch = by_scale(paper=0, night=64, tiny=16)
base_lr = by_scale(paper=0.0, night=1e-3, tiny=3e-3)

publish = False  # the step report copies table, figure and records to results/hemoe/{scale}
check = False  # recompute the tables of results/hemoe from their records, and stop

_instead = {  # of global_config.py, which have no say here
    "lr": "tune_lr", "num_epochs": "tune_steps", "batch_size": "tune_batch", "train_sample": "task_examples",
    "gradient_accumulation_steps": "tune_accumulation",
}  # fmt: skip


def main(c):
    from expert_merging.hemoe import pipeline

    pipeline.check(c)

    from expert_merging.hemoe import data, dense_model, examples, measuring, mixtures, report, splitting

    if c.check:
        return report.check()
    if c.publish:
        from expert_merging.report.publish import require_commit

        require_commit()

    in_order = {
        # At tiny and night: six multiple-choice tasks made of docstrings, and a small Llama trained on their text. At real:
        # questions as tasks for lm_eval. Of raw data, at paper and real: instructions in templates.
        "data": data.data,
        "base": dense_model.base,
        # Domains: the tasks of the instruction data, or clusters of its embeddings.
        "domains": examples.domains,
        # Importance of neuron i to domain c: sum over sequences of |sum of w dL/dw over the neuron's weights|.
        "scores": splitting.scores,
        # Partition: experts and the domains they serve, max sum_e sum_c y_ec sum_{i in e} s_ic, sizes within a ratio R;
        # and the baselines that split otherwise.
        "partition": splitting.partition,
        # The mixture: sum of the k experts that the router ranks first, weight 1 each; with k = n it is the dense model.
        "conversion": mixtures.conversion,
        # Tuning on the instruction data: cross-entropy + lambda n sum_e f_e rho_e P_e a layer; experts stay as they are.
        "tuning": mixtures.tuning,
        # For k = 1..n: the share of neurons that is activated, the loss of held-out answers, and accuracy by lm_eval.
        "measure": measuring.measure,
        "evaluation": measuring.evaluation,
        # Accuracy against activated share, over all seeds there are.
        "report": report.make,
    }
    for name, step in in_order.items():
        if name in c.steps:
            step(c)


if __name__ == "__main__":
    run(main, globals())
