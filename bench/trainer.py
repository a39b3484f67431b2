"""The same training by transformers.Trainer and peft: every step's sequences padded to its longest one."""

import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from bench.text import Text, Tokens

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_PAD = 3
_IGNORE = -100


class TrainerJob:
    """A LoRA on the model in a folder, trained by the stock Trainer."""

    def __init__(self, folder: Path, *, rank: int, learning_rate: float, scratch: Path) -> None:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        # Any: peft's own type is no transformers model by its annotations.
        self._model: Any = get_peft_model(base, LoraConfig(r=rank, lora_alpha=32, target_modules=TARGETS))
        self._learning_rate = learning_rate
        self._scratch = scratch

    def train(self, text: Text) -> float:
        """CPU time in s of a step for each of the text's steps, from the first one's begin to the last one's end."""
        batch = len(text.steps[0])
        clock = _StepClock()
        arguments = TrainingArguments(
            output_dir=str(self._scratch),
            per_device_train_batch_size=batch,
            max_steps=len(text.steps),
            learning_rate=self._learning_rate,
            lr_scheduler_type="constant",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            # Both sides see the same batches.
            train_sampling_strategy="sequential",
        )
        trainer = Trainer(
            model=self._model, args=arguments, train_dataset=_Sequences(text), data_collator=_pad, callbacks=[clock]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return clock.elapsed_s


class _Sequences(Dataset[Tokens]):
    def __init__(self, text: Text) -> None:
        self._all = [tokens for step in text.steps for tokens in step]

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, index: int) -> Tokens:
        return self._all[index]


def _pad(batch: list[Tokens]) -> dict[str, Tensor]:
    """As transformers' data collators do it: to the longest, with a mask, and no loss where there is padding."""
    longest = max(map(len, batch))
    ids = torch.full((len(batch), longest), _PAD)
    for row, tokens in zip(ids, batch, strict=True):
        row[: len(tokens)] = torch.from_numpy(tokens)
    mask = torch.tensor([[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens in batch])
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, _IGNORE)}


class _StepClock(TrainerCallback):  # type: ignore[misc]  # transformers gives it no type
    def __init__(self) -> None:
        self._begin_s: float | None = None
        self.elapsed_s = 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        del args, state, control
        if self._begin_s is None:
            self._begin_s = time.process_time()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        del args, state, control
        assert self._begin_s is not None
        self.elapsed_s = time.process_time() - self._begin_s
