"""Meta-trains the bundled model in transformers' Trainer, on invented people, and evaluates it.

    python examples/meta_trainer.py --output_dir runs/trainer --max_steps 300

All options of MetaTrainingArguments are options here.
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from gdprompt_fast.bundled import bundled_folder
from gdprompt_fast.data import make_people_data
from gdprompt_fast.trainer import MetaTrainer, MetaTrainingArguments

parser = HfArgumentParser(MetaTrainingArguments)
parser.set_defaults(inner_lr=0.5, learning_rate=1e-3, answer_tokens=4, save_strategy="no")
(args,) = parser.parse_args_into_dataclasses()

# Any causal LM that the engine takes, and any rows of "context", "query" and "response", will do.
model = AutoModelForCausalLM.from_pretrained(bundled_folder(), dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(bundled_folder())
people = make_people_data(512, 64, seed=0)

trainer = MetaTrainer(model, args, people.train, people.test, processing_class=tokenizer)
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
print(f"KL to the prompted model, on people it never saw: before {before:.3f}, after {after:.3f}")
trainer.save_model()
