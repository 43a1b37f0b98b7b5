"""Started in several processes: the training script, which also notes how it was distributed, beside its folder."""

import json
from pathlib import Path

from on_cpu import describe, prepare

from tic_grpo_trl import TICGRPOTrainer
from tic_grpo_trl.scripts import train as train_script


class DescribedTrainer(TICGRPOTrainer):
    def train(self, *args, **kwargs):
        output = super().train(*args, **kwargs)
        described = describe(self)
        if self.accelerator.is_main_process:
            Path(f"{self.args.output_dir}.json").write_text(json.dumps(described))
        return output


prepare()
train_script.TICGRPOTrainer = DescribedTrainer
train_script.main()
