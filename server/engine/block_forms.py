"""Which form blocks are kept in, chosen for a model, its backend and a disk; and all that can be restored.

Keys and values of a token are 2 e values in a layer (e = num_kv_heads * head_dim), its hidden state is d.
Where d is less (multi-head attention: half), the same budgets hold up to twice the tokens as hidden states,
and half the bytes are read; but two projections are to be computed. So they are restored sooner only from a
disk that gives less than (bytes saved / seconds of the projections), and both are measured.
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

_NOUNS: dict[FormName, str] = {"kv": "keys and values", "hidden": "hidden states"}


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
    tokens = pool.block_size
    sizes = (
        f"a token takes {memory.block_bytes // tokens:,} bytes as keys and values,"
        f" {memory.state_bytes // tokens:,} as hidden states"
    )
    why_not = None
    if memory.state_bytes >= memory.block_bytes:
        why_not = sizes
    elif memory.backend != "native" or not isinstance(device, CpuDevice):
        why_not = (
            f"{sizes}, but only the native CPU backend restores from these, and this is {memory.backend}"
        )
    if why_not is not None:
        if setting == "hidden":
            raise SettingError(f"recycled_blocks is hidden, but {why_not}: wanted auto or kv")
        return BlockForms((kv,), (kv,), f"{why_not}: keys and values are kept")
    hidden = HiddenForm(memory, pool)
    hidden.measure()
    chosen: FormName
    if setting == "auto":
        chosen, comparison = _sooner(kv, hidden, read_bytes_per_second())
    else:
        chosen, comparison = setting, "as recycled_blocks says"
    reason = f"{sizes}; {comparison}: {_NOUNS[chosen]} are kept"
    if chosen == "kv":
        return BlockForms((kv,), (kv, hidden), reason)
    hidden.start_keeping()
    return BlockForms((hidden, kv), (hidden, kv), reason)


def _sooner(kv: KvForm, hidden: HiddenForm, read_speed: float | None) -> tuple[FormName, str]:
    """The form that is restored sooner from the disk, and the comparison."""
    if read_speed is None:
        return "kv", "how fast the disk reads is not known"
    kv_seconds = kv.block_bytes / read_speed
    hidden_seconds = hidden.block_bytes / read_speed + hidden.work_seconds
    break_even = (kv.block_bytes - hidden.block_bytes) / hidden.work_seconds
    comparison = (
        f"at the disk's {read_speed / 1e6:,.0f} MB/s a block comes back in {kv_seconds * 1e3:.2f} ms as the"
        f" former, in {hidden_seconds * 1e3:.2f} as the latter, {hidden.work_seconds * 1e3:.2f} of them"
        f" computing, and sooner only below {break_even / 1e6:,.0f} MB/s"
    )
    return ("hidden" if hidden_seconds < kv_seconds else "kv"), comparison
