"""Which form blocks are kept in, chosen for a model, its backend and a disk; and all that can be restored.

Keys and values of a token are 2 e values in a layer (e = num_kv_heads * head_dim), its hidden state is d.
Where d is less (multi-head attention: half), the same budgets hold up to twice the tokens as hidden states,
and half the bytes are read; but two projections are to be computed, while others are read. So they are
restored sooner only from a disk that gives less than (bytes of keys and values / seconds of the projections),
and both are measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from scone.cache.device import CpuDevice, Device
from scone.server.engine.block_form import BlockForm, FormName
from scone.server.engine.engine_config import RecycledBlocks
from scone.server.engine.hidden_form import HiddenForm
from scone.server.engine.kv_blocks import BlockPool
from scone.server.engine.kv_form import KvForm
from scone.server.engine.model_runner import RecycledMemory
from scone.server.errors import SettingError

_BESIDE_READS = 1.4
"""How much longer keys and values take to compute while the next blocks are read, on two cores."""


@dataclass(frozen=True, slots=True)
class BlockForms:
    """The forms of one engine.

    Attributes:
        kept: in which blocks are kept, the first one that can be had.
        readable: in which they are looked for.
        reason: why, in a sentence with the arithmetic.
    """

    kept: tuple[BlockForm, ...]
    readable: tuple[BlockForm, ...]
    reason: str

    @property
    def staging_bytes(self) -> int:
        """Host memory beside the KV cache."""
        return sum(form.staging_bytes for form in self.readable)


def open_forms(
    setting: RecycledBlocks,
    memory: RecycledMemory,
    device: Device,
    pool: BlockPool,
    read_bytes_per_second: Callable[[], float | None],
) -> BlockForms:
    """The forms for a model whose KV cache is empty still.

    Args:
        read_bytes_per_second: measures the disk, if that is asked for; None: it cannot be told.

    Raises:
        SettingError: hidden states are wanted where they are of no use or cannot be had.
    """
    kv = KvForm(memory, device, pool)
    sizes = (
        f"a token takes {memory.block_bytes // pool.block_size:,} bytes as keys and values in"
        f" {str(memory.kv_dtype).removeprefix('torch.')},"
        f" {memory.state_bytes // pool.block_size:,} as hidden states"
    )
    why_not = _why_not_hidden(memory, device)
    if why_not is not None:
        if setting == "hidden":
            raise SettingError(f"recycled_blocks is hidden, but {sizes}{why_not}: wanted auto or kv")
        return BlockForms((kv,), (kv,), f"{sizes}{why_not}: keys and values are kept")
    hidden = HiddenForm(memory, pool)
    hidden.measure()
    chosen, why = setting, "as recycled_blocks says"
    if chosen == "auto":
        chosen, why = _sooner(kv, hidden, read_bytes_per_second())
    if chosen == "kv":
        return BlockForms((kv,), (kv, hidden), f"{sizes}; {why}: keys and values are kept")
    hidden.start_keeping()
    return BlockForms((hidden, kv), (hidden, kv), f"{sizes}; {why}: hidden states are kept")


def _why_not_hidden(memory: RecycledMemory, device: Device) -> str | None:
    """Why hidden states are no choice, to follow upon the sizes; None: they are one."""
    if memory.state_bytes >= memory.block_bytes:
        return ""
    if memory.backend != "native" or not isinstance(device, CpuDevice):
        return f", but only the native CPU backend restores from these, and this is {memory.backend}"
    return None


def _sooner(kv: KvForm, hidden: HiddenForm, read_speed: float | None) -> tuple[FormName, str]:
    """The form that is restored sooner from the disk, and the comparison."""
    if read_speed is None:
        return "kv", "how fast the disk reads is not known"
    work_seconds = _BESIDE_READS * hidden.work_seconds
    kv_seconds = kv.block_bytes / read_speed
    hidden_seconds = max(hidden.block_bytes / read_speed, work_seconds)
    comparison = (
        f"at the disk's {read_speed / 1e6:,.0f} MB/s a block comes back in {kv_seconds * 1e3:.2f} ms as the"
        f" former, in {hidden_seconds * 1e3:.2f} as the latter, and sooner as these below"
        f" {kv.block_bytes / work_seconds / 1e6:,.0f} MB/s"
    )
    return ("hidden" if hidden_seconds < kv_seconds else "kv"), comparison
