"""The base model's own weights as a client's trainable model."""

import torch
from torch import Tensor

from gradstream.engine.models.flat import FlatParameters, FullLayout
from gradstream.engine.optim.state import new_state, state_parts
from gradstream.engine.trained import Owner, Training
from gradstream.shared.ids import ModelId, TenantId


class FullModel:
    """A `TrainedModel` over the parameters that the base model computes with; there is one at a time.

    weights: the master weights. They are the flat parameters themselves where these are of the same dtype, else an fp32 copy that
    `sync` rounds into them. All tensors stay the same objects for life. is_asleep: they are in host memory, and no pass can run.
    """

    def __init__(
        self,
        *,
        owner: Owner,
        flat: FlatParameters,
        master_dtype: torch.dtype,
        training: Training | None = None,
    ) -> None:
        """training None: the defaults. master_dtype: of the weights; a compute dtype of float32 needs no other."""
        learning = Training() if training is None else training
        flat.is_fresh = False
        self.owner = owner
        self.flat = flat
        self.weights = flat.weights if flat.weights.dtype == master_dtype else flat.weights.to(master_dtype)
        self.grad = torch.zeros(flat.layout.num_params, dtype=torch.float32, device=flat.weights.device)
        self.optimizer = learning.optimizer
        self.reduction = learning.reduction
        parts = state_parts(self.optimizer, flat.layout, weights_dtype=self.weights.dtype)
        self.optim = new_state(parts, device=flat.weights.device)
        self.step = 0
        self.optim_began = 0
        self.has_grad = False
        self.valid_tokens = 0
        self.is_asleep = False

    @property
    def layout(self) -> FullLayout:
        return self.flat.layout

    @property
    def model_id(self) -> ModelId:
        return self.owner.model_id

    @property
    def tenant(self) -> TenantId:
        return self.owner.tenant

    def named_views(self, flat: Tensor) -> dict[str, Tensor]:
        """Views into any flat tensor of this model's layout, by the parameters' names."""
        return self.layout.named_views(flat)

    def clear_grad(self) -> None:
        """Forget what was accumulated, and how many tokens it was."""
        self.grad.zero_()
        self.has_grad = False
        self.valid_tokens = 0

    @torch.no_grad()
    def sync(self) -> None:
        """Round the master weights into the parameters."""
        if self.weights is not self.flat.weights:
            self.flat.weights.copy_(self.weights)

    @torch.no_grad()
    def take_flat(self) -> None:
        """Make the master weights follow the parameters, after these were read from files."""
        if self.weights is not self.flat.weights:
            self.weights.copy_(self.flat.weights)

    def move(self, device: torch.device) -> int:
        """Bring weights, gradient and optimizer state to a device, bit by bit; returns how many bytes went."""
        if self.weights.device == device:
            return 0
        own = [self.grad, *self.optim.values()]
        if self.weights is not self.flat.weights:
            own.append(self.weights)
        for tensor in own:
            tensor.data = tensor.data.to(device)
        self.flat.move(device)
        if torch.cuda.is_available():
            # What the caching allocator keeps would not be free for others.
            torch.cuda.empty_cache()
        return sum(_nbytes(tensor) for tensor in [*own, self.flat.weights])


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
