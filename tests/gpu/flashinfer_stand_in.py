"""FlashInfer as far as we use it, in torch, for machines without a GPU.

Its wrappers compute from the arrays of their plan and from nothing else, in FlashInfer's words (its variants.cuh), and
refuse whatever FlashInfer would. Parameters are called and ordered as in FlashInfer 0.6.9.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What a wrapper was told of R rows."""

    qo_indptr: Tensor  # (R + 1,)
    kv_indptr: Tensor  # (R + 1,)
    kv_indices: Tensor  # (pages of all rows,)
    kv_last_page_len: Tensor  # (R,)
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    causal: bool
    window_left: int
    logits_soft_cap: float
    sm_scale: float
    dtype: torch.dtype

    def check(self, seq_lens: Tensor) -> None:
        """What its kernels rely on, and find out by reading elsewhere."""
        arrays = (self.qo_indptr, self.kv_indptr, self.kv_indices, self.kv_last_page_len, seq_lens)
        num_rows = len(self.kv_last_page_len)
        pages = self.kv_indptr.diff()
        assert num_rows > 0
        assert all(each.dtype is torch.int32 and each.device.type == "cpu" and each.dim() == 1 for each in arrays)
        assert len(self.qo_indptr) == len(self.kv_indptr) == num_rows + 1
        assert self.qo_indptr[0] == self.kv_indptr[0] == 0
        assert bool((self.qo_indptr.diff() > 0).all()) and bool((pages > 0).all())
        assert len(self.kv_indices) == int(self.kv_indptr[-1])
        assert 1 <= int(self.kv_last_page_len.min()) <= int(self.kv_last_page_len.max()) <= self.page_size
        assert torch.equal(seq_lens, (pages - 1) * self.page_size + self.kv_last_page_len)
        assert self.num_qo_heads % self.num_kv_heads == 0


class StandIn:
    """The library. It counts what was planned: by the decode wrapper, and by the other one."""

    def __init__(self) -> None:
        self.num_planned = {"decode": 0, "prefill": 0}

    def BatchDecodeWithPagedKVCacheWrapper(  # noqa: N802 - FlashInfer's name
        self, float_workspace_buffer: Tensor, kv_layout: str = "NHD"
    ) -> DecodeWrapper:
        """Rows of one token."""
        return DecodeWrapper(self, float_workspace_buffer, kv_layout)

    def BatchPrefillWithPagedKVCacheWrapper(  # noqa: N802 - FlashInfer's name
        self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", *, backend: str = "auto"
    ) -> PrefillWrapper:
        """Rows of any number of tokens."""
        assert backend in ("fa2", "fa3")
        return PrefillWrapper(self, float_workspace_buffer, kv_layout)


class _Wrapper:
    def __init__(self, library: StandIn, float_workspace_buffer: Tensor, kv_layout: str) -> None:
        assert float_workspace_buffer.dtype is torch.uint8 and len(float_workspace_buffer)
        assert kv_layout == "HND"
        self._library = library
        self._planned: Planned | None = None

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor) -> Tensor:
        """Attend row by row."""
        planned, (keys, values) = self._planned, paged_kv_cache
        assert planned is not None, "plan comes first"
        assert q.shape == (int(planned.qo_indptr[-1]), planned.num_qo_heads, planned.head_dim) == out.shape
        assert q.dtype == keys.dtype == values.dtype == out.dtype == planned.dtype
        assert keys.shape[1:] == (planned.num_kv_heads, planned.page_size, planned.head_dim) == values.shape[1:]
        assert keys.stride() == values.stride() and q.stride(2) == keys.stride(3) == 1
        assert out.is_contiguous()
        queries, pages = planned.qo_indptr.tolist(), planned.kv_indptr.tolist()
        for row, last_page_len in enumerate(planned.kv_last_page_len.tolist()):
            mine = planned.kv_indices[pages[row] : pages[row + 1]].long().to(q.device)
            kv_len = (len(mine) - 1) * planned.page_size + last_page_len
            tokens = slice(queries[row], queries[row + 1])
            k, v = (slab[mine].transpose(0, 1).flatten(1, 2)[:, :kv_len] for slab in (keys, values))
            out[tokens] = _attend(q[tokens], k, v, planned).to(out.dtype)
        return out


class DecodeWrapper(_Wrapper):
    """Without tensor cores, for a few group sizes."""

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
        sm_scale: float | None = None,
        seq_lens: Tensor,
    ) -> None:
        """Take one token a row."""
        assert num_qo_heads // num_kv_heads in (1, 2, 3, 4, 8)
        assert sm_scale is not None and kv_data_type is q_data_type
        self._planned = Planned(
            qo_indptr=torch.arange(len(indptr), dtype=torch.int32),
            kv_indptr=indptr.clone(),  # whoever plans may use the memory again
            kv_indices=indices.clone(),
            kv_last_page_len=last_page_len.clone(),
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            page_size=page_size,
            causal=False,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap or 0.0,
            sm_scale=sm_scale,
            dtype=q_data_type,
        )
        self._planned.check(seq_lens)
        self._library.num_planned["decode"] += 1


class PrefillWrapper(_Wrapper):
    """On tensor cores, for any group size."""

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
        seq_lens: Tensor,
        max_token_per_sequence: int,
    ) -> None:
        """Take the rows as they are."""
        assert sm_scale is not None and kv_data_type is q_data_type
        assert int(qo_indptr.diff().max()) == max_token_per_sequence
        self._planned = Planned(
            qo_indptr=qo_indptr.clone(),
            kv_indptr=paged_kv_indptr.clone(),
            kv_indices=paged_kv_indices.clone(),
            kv_last_page_len=paged_kv_last_page_len.clone(),
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim_qk,
            page_size=page_size,
            causal=causal,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap or 0.0,
            sm_scale=sm_scale,
            dtype=q_data_type,
        )
        self._planned.check(seq_lens)
        self._library.num_planned["prefill"] += 1


def _attend(q: Tensor, k: Tensor, v: Tensor, planned: Planned) -> Tensor:
    """Attend q (qo_len, num_qo_heads, head_dim) to k and v (num_kv_heads, kv_len, head_dim)."""
    (qo_len, kv_len), group = (len(q), k.shape[1]), planned.num_qo_heads // planned.num_kv_heads
    k, v = (each.float().repeat_interleave(group, dim=0) for each in (k, v))
    logits = torch.einsum("qhd,hkd->hqk", q.float(), k)
    if planned.logits_soft_cap > 0:
        logits = planned.logits_soft_cap * torch.tanh(logits * planned.sm_scale / planned.logits_soft_cap)
    else:
        logits *= planned.sm_scale
    qo_idx = torch.arange(qo_len, device=q.device)[:, None]
    kv_idx = torch.arange(kv_len, device=q.device)
    mask = torch.ones(qo_len, kv_len, dtype=torch.bool, device=q.device)
    if planned.causal:
        mask &= kv_idx <= kv_len - qo_len + qo_idx
    if planned.window_left >= 0:
        mask &= kv_idx + qo_len + planned.window_left >= kv_len + qo_idx
    return torch.einsum("hqk,hkd->qhd", logits.masked_fill(~mask, -torch.inf).softmax(dim=-1), v)
