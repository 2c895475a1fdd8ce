"""The constants that every script shares. Edit a line, or give it on the command line: `--lr 1e-4 --scale tiny`.

A script's own constants stand at its top. `by_scale(paper, night, tiny, real)` holds one value for each scale.
"""

from expert_merging.core.scales import by_scale

scale = "paper"  # paper (Switch-Base on a GPU) | night (a laptop, hours) | tiny (minutes) | real (published weights)
seed = 0  # of everything random but the data splits
reading = "paper"  # paper: Algorithm 1 as printed | released: the authors' code | paper+counts: see docs/audit.md
device = by_scale(paper="cuda", night="auto", tiny="auto")  # cuda | cpu | auto

# -- where things are read from and written to; {name} stands for another constant, {experts} for experts a layer
RUN_DIR = "runs/{scale}"  # everything the scripts write
DATA_DIR = "{RUN_DIR}/data"  # seq2seq features, one folder a task
PICKLE_PATH = "{RUN_DIR}/seed{seed}/histories"  # histories, as .pkl and .json
MODEL_SAVE_PATH = "{RUN_DIR}/seed{seed}/models"  # weights, as .pt and as Hugging Face folders
SOURCE_MODEL_WEIGHT_PATH = "{MODEL_SAVE_PATH}/single_task_[{experts}]"  # the single-task models
SOURCE_PICKLE_PATH = "{PICKLE_PATH}/single_task_[{experts}]"  # their histories: scores and expert usage
BASE_MODEL_PATH = by_scale(
    paper="google/switch-base-{experts}",
    night="base_models/tiny-{experts}",
    tiny="base_models/tiny-{experts}",
    real="models/smollm2-moe",
)  # hub name or local folder: a Switch Transformer, or a Mixtral, Qwen2-MoE or OLMoE (docs/moe.md)

# -- the tasks
task_types = by_scale(
    paper=("ag_news", "squad", "xsum"),
    night=("doc_topic", "doc_qa", "doc_summary"),
    tiny=("doc_topic", "doc_qa", "doc_summary"),
    real=("ag_news", "squad", "xsum"),
)  # of the multi-task model
AG_NEWS_PATH = "fancyzhx/ag_news"  # hub name, or a folder with train.csv and test.csv
SQUAD_PATH = "rajpurkar/squad"  # hub name, or a folder with train-v1.1.json and dev-v1.1.json
XSUM_PATH = "EdinburghNLP/xsum"  # hub name, or a folder with {train,validation,test}.jsonl
max_input_length = by_scale(paper=1000, night=256, tiny=256)  # tokens; longer inputs are cut
max_decoder_length = by_scale(paper=200, night=48, tiny=48)  # tokens; longer targets are cut, decoding stops
train_examples = by_scale(paper=0, night=0, tiny=1200)  # a task; 0 takes all there are
train_sample = by_scale(paper=0, night=2400, tiny=0, real=300)  # of these, drawn by each seed for itself; 0 takes all
validation_examples = by_scale(paper=0, night=240, tiny=160, real=60)  # a task; 0 takes all
test_examples = by_scale(paper=0, night=0, tiny=240, real=200)  # a task; 0 takes all

# -- training (paper, A.3): AdamW at a constant rate
batch_size = by_scale(paper=8, night=4, tiny=4)  # of a task in one pass, over all processes; cut if memory is short
gradient_accumulation_steps = by_scale(paper=3, night=1, tiny=1)  # passes a task: at paper 24 examples of each a step
gradient_checkpointing = False  # activations computed again in the backward pass: less memory, a third more time
precision = "auto"  # auto: bf16 on GPUs that have it, else fp32 | bf16 | fp32; weights and optimizer are always fp32
lr = by_scale(paper=3e-4, night=5e-4, tiny=5e-4, real=5e-5)  # constant
adam_betas = (0.9, 0.98)
adam_eps = 1e-6  # the released code's; the paper prints 1e-16
weight_decay = 0.005
max_grad_norm = 0.0  # 0 does not clip, as in the paper
num_epochs = by_scale(paper=10, night=2, tiny=2)  # at most; the best one on validation is kept
test_each_epoch = False  # note the test scores of every epoch too; none is chosen by them
checkpoint_minutes = 5.0  # between checkpoints inside an epoch; there is one after every epoch as well

# -- decoding (paper, 4.1)
num_beams = by_scale(paper=3, night=3, tiny=3, real=1)
repetition_penalty = 1.2
no_repeat_ngram_size = 3
length_penalty = 1.0
eval_batch_size = by_scale(paper=32, night=32, tiny=32)  # examples decoded together
