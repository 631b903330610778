"""Pages of the caches, given out without a GPU."""

from __future__ import annotations

import torch

from dsv32_plugin.sglang_adapter.upstream import PagedTokenToKVPoolAllocator


class CpuPagedAllocator(PagedTokenToKVPoolAllocator):
    """SGLang's allocator of pages, whose two kernels are Triton's, in torch."""

    free_pages: torch.Tensor

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        """Slots for the tokens prefix_lens .. seq_lens - 1 of each sequence; None where too few pages are free.

        A sequence first fills the page that `last_loc`, the slot of its last token so far, is in.
        """
        held_b, total_b = _pages(prefix_lens, self.page_size), _pages(seq_lens, self.page_size)
        wanted = int((total_b - held_b).sum())
        if self.need_sort and wanted > len(self.free_pages):
            self.merge_and_sort_free()
        if wanted > len(self.free_pages):
            return None
        slots = []
        columns = (prefix_lens, seq_lens, last_loc, held_b, total_b)
        for prefix, length, last, held, total in zip(*(column.tolist() for column in columns), strict=True):
            position = torch.arange(prefix, length)
            # Row 0 is the page that is already held, if it has room; the others are new.
            pages = torch.cat((torch.tensor([last // self.page_size]), self.free_pages[: total - held]))
            self.free_pages = self.free_pages[total - held :]
            slots.append(pages[position // self.page_size - held + 1] * self.page_size + position % self.page_size)
        return torch.cat(slots)

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """A slot for the last token of each sequence; None where too few pages are free."""
        return self.alloc_extend(seq_lens - 1, seq_lens_cpu - 1, seq_lens, seq_lens_cpu, last_loc, len(seq_lens))


def _pages(lengths: torch.Tensor, page_size: int) -> torch.Tensor:
    return (lengths + page_size - 1) // page_size
