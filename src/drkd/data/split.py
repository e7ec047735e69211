"""One split of a detection data set, whatever format it was read from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from drkd.contracts import ImageRecord
from drkd.data.records import PackedRecords


@dataclass(frozen=True)
class DatasetSplit:
    """The annotated images of one split.

    Args:
        name: The split's name ("train", "tune", "val").
        records: One entry an image, in the order of the source file; kept as `PackedRecords`.
        class_names: Names of classes 0..K-1.
        category_ids: The source file's category ids by label, for writing results in its terms; -1 for a class that
            the file does not list. Empty if the format has none.
    """

    name: str
    records: Sequence[ImageRecord]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.records, PackedRecords):
            object.__setattr__(self, "records", PackedRecords(self.records))

    def __len__(self) -> int:
        return len(self.records)

    def numbered_categories(self) -> dict[str, int]:
        """The category id of every class by name: the data's own, an unused number where it has none, else 1..K."""
        if not self.category_ids:
            return {name: number for number, name in enumerate(self.class_names, start=1)}
        found = dict(zip(self.class_names, self.category_ids, strict=True))
        unused = max(self.category_ids)
        for name, number in found.items():
            if number < 0:
                unused += 1
                found[name] = unused
        return found

    def first(self, count: int | None) -> DatasetSplit:
        """The split cut to its first images.

        Args:
            count: How many images to keep, > 0; ``None`` keeps all.

        Raises:
            ValueError: If ``count`` is not positive.
        """
        if count is None:
            return self
        if count <= 0:
            raise ValueError(f"the number of images to keep must be positive, got {count}")
        return replace(self, records=self.records[:count])
