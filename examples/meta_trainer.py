"""Meta-trains a model in transformers' Trainer until one gradient step on a passage answers for it.

    python examples/meta_trainer.py --output_dir runs/trainer --max_steps 300

Every option of MetaTrainingArguments is one of the command line (--help).
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from gdprompt_fast.bundled import bundled_folder
from gdprompt_fast.data import make_people_data
from gdprompt_fast.trainer import MetaTrainer, MetaTrainingArguments

parser = HfArgumentParser(MetaTrainingArguments)
parser.set_defaults(
    inner_lr=0.5, learning_rate=1e-3, per_device_train_batch_size=16, max_grad_norm=1.0,
    eval_strategy="steps", eval_steps=100, logging_steps=10, save_strategy="no",
    answer_tokens=4, load_best_model_at_end=False,
)  # fmt: skip
(args,) = parser.parse_args_into_dataclasses()

folder = bundled_folder()  # or a name on the hub: "meta-llama/Llama-3.2-1B"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
data = make_people_data(2048, 64, seed=0)  # rows of "context", "query" and "response"

trainer = MetaTrainer(model, args, data.train, data.test, processing_class=tokenizer)
print(f"before: {trainer.evaluate()['eval_loss']:.3f}")
trainer.train()
print(f"after: {trainer.evaluate()['eval_loss']:.3f}")
trainer.save_model()
