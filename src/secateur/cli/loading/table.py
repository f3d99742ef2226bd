"""Data from a folder that ``save_to_disk`` of Hugging Face datasets wrote."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from secateur.cli.loading.arrays import INPUT_NAMES, LABEL_NAMES
from secateur.cli.loading.models import ModelSource, library_errors
from secateur.cli.loading.pictures import loader, preparation
from secateur.cli.loading.tokens import pieces_of, tokenizer_of
from secateur.config.sections import ImagesSection, TextSection
from secateur.errors import CalibrationError, SettingError

ONE, SEVERAL = "state.json", "dataset_dict.json"
LABELS, INPUTS = (*LABEL_NAMES, "label"), ("pixel_values", *INPUT_NAMES)


def is_table(folder: Path) -> bool:
    """Whether the folder is one that ``save_to_disk`` wrote."""
    return os.path.isfile(folder / ONE) or os.path.isfile(folder / SEVERAL)


def table(
    option: str,
    folder: Path,
    images: ImagesSection,
    texts: TextSection,
    source: ModelSource | None,
    batch_size: int,
    seed: int,
    samples: int | None,
) -> Any:
    """A loader of a dataset's rows, in an order drawn from `seed`.

    Labels are in a column ``label``, ``labels`` or ``y``. Inputs are, where there is such a column: tokens in
    ``input_ids``, with all other columns of numbers; pictures; arrays in ``pixel_values``, ``x``, ``inputs``
    or ``images``; text, each row padded to `texts.length` if it has a label, else all rows one after another.

    Raises:
        SettingError: If datasets, or what reads a column, is missing; or the folder holds several splits.
        CalibrationError: If no column can be an input.
    """
    where = f"{option} {folder}"
    if os.path.isfile(folder / SEVERAL):
        splits = sorted(path.parent.name for path in folder.glob(f"*/{ONE}"))
        raise SettingError(
            f"{where}: expected one split of a dataset, got {', '.join(splits) or 'none'}. "
            f"Name one: {folder / splits[0] if splits else folder}."
        )
    try:
        import datasets
    except ImportError as error:
        raise SettingError(
            f"{where}: expected Hugging Face datasets, which reads this folder, got {error}. "
            "Run pip install datasets."
        ) from error
    with library_errors(where, "a folder of datasets.save_to_disk", "Save it again."):
        rows = datasets.load_from_disk(str(folder))
    columns = dict(rows.features)
    label = next((name for name in LABELS if name in columns), None)

    def label_of(row: Any) -> Any:
        return None if label is None else row[label]

    pictured = [name for name, kind in columns.items() if isinstance(kind, datasets.Image)]
    arrays = [name for name in INPUTS if name in columns and name not in pictured]
    written = [name for name, kind in columns.items() if getattr(kind, "dtype", "").endswith("string")]
    if "input_ids" in columns:
        rows = rows.remove_columns(written).with_format("torch")

        def tokenised(index: int) -> tuple[dict[str, Any], Any]:
            row = dict(rows[index])
            return row, None if label is None else row.pop(label)

        return loader(len(rows), tokenised, batch_size, seed, samples)
    if pictured:
        prepare = preparation(option, images, source)
        return loader(
            len(rows),
            lambda i: (prepare((row := rows[i])[pictured[0]]), label_of(row)),
            batch_size,
            seed,
            samples,
        )
    if arrays:
        rows = rows.with_format("torch")
        return loader(
            len(rows), lambda i: ((row := rows[i])[arrays[0]], label_of(row)), batch_size, seed, samples
        )
    if written and label is None:
        text = "\n\n".join(rows[written[0]])
        pieces = pieces_of(where, text, option, texts, source)
        return loader(len(pieces), lambda i: (pieces[i], None), batch_size, seed, samples)
    if written:
        tokenizer = tokenizer_of(option, texts, source)

        def read(index: int) -> tuple[dict[str, Any], Any]:
            row = rows[index]
            found = tokenizer(
                row[written[0]],
                truncation=True,
                padding="max_length",
                max_length=texts.length,
                return_tensors="pt",
            )
            return {name: value[0] for name, value in found.items()}, label_of(row)

        return loader(len(rows), read, batch_size, seed, samples)
    raise CalibrationError(
        f"{where}: expected a column of pictures, text, input_ids or {', '.join(INPUTS)}, got "
        f"{', '.join(columns) or 'none'}. Rename one."
    )
