"""The same job in one process on plain torch, transformers and peft: the floor that the server is compared with."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from bench import job

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


class BareJob:
    """A LoRA on the model in a folder, with its optimizer. Every call returns its wall time in ms."""

    def __init__(self, folder: Path) -> None:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._model = get_peft_model(base, LoraConfig(r=job.RANK, lora_alpha=job.LORA_ALPHA, target_modules=TARGETS))
        parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(
            parameters, lr=job.LEARNING_RATE, betas=(0.9, job.BETA2), eps=job.EPS, weight_decay=0.0
        )

    def forward_backward(self, data: job.Data) -> float:
        """Sum of the token losses, its gradients, and the log-probabilities as numbers, as the server returns them."""

        def work() -> None:
            logprobs = self._logprobs(data)
            loss = -logprobs.sum()
            torch.autograd.backward(loss)
            loss.item()
            logprobs.detach().numpy()

        return _timed_ms(work)

    def forward(self, data: job.Data) -> float:
        """The log-probabilities without gradients."""

        def work() -> None:
            with torch.no_grad():
                self._logprobs(data).numpy()

        return _timed_ms(work)

    def optim_step(self) -> float:
        """One AdamW update, and gradients set to none."""

        def work() -> None:
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)

        return _timed_ms(work)

    def _logprobs(self, data: job.Data) -> torch.Tensor:
        logits = self._model(input_ids=torch.from_numpy(data.inputs), use_cache=False).logits
        targets = torch.from_numpy(data.targets).unsqueeze(-1)
        return torch.log_softmax(logits, dim=-1).gather(-1, targets).squeeze(-1)


def _timed_ms(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1000
