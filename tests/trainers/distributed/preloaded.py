"""What forked processes have imported already. DeepSpeed lies aside: phases that do without it must not find it."""

import importlib
import sys

for name in ("trainers.launch", "trainers.meter", "trainers.core.parallel", "transformers.models.llama.modeling_llama"):
    importlib.import_module(name)
for kind in ("sft", "reward", "dpo", "ppo", "distill"):
    importlib.import_module(f"trainers.phases.{kind}.train")
for kind in ("rollout", "evaluate", "package"):
    importlib.import_module(f"trainers.phases.{kind}.run")

importlib.import_module("deepspeed")
DEEPSPEED = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "deepspeed"}
