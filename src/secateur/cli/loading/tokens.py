"""Data from a text file, by a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.cli.loading.models import HuggingFaceModel, ModelSource, library_errors
from secateur.cli.loading.pictures import loader
from secateur.config.sections import TextSection
from secateur.errors import CalibrationError, SettingError

if TYPE_CHECKING:
    import torch

CAUSAL = ("ForCausalLM", "LMHeadModel")
"""How classes of language models that predict the next token end: their labels are the tokens."""


def tokens(
    option: str,
    path: Path,
    texts: TextSection,
    source: ModelSource | None,
    batch_size: int,
    seed: int,
    samples: int | None,
) -> Any:
    """A loader of mappings with ``input_ids`` and ``attention_mask`` [batch, length], and ``labels``.

    The text is cut into pieces of `texts.length` tokens; what is left over is dropped, unless it is all
    there is. Models that predict the next token get the tokens as labels too; others get none.

    Raises:
        CalibrationError: If the text is empty or cannot be read.
        SettingError: If there is no tokenizer.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"{option} {path}: expected text in UTF-8, got a file that cannot be read ({error}). Convert it."
        ) from error
    pieces = pieces_of(f"{option} {path}", text, option, texts, source)
    return loader(len(pieces), lambda i: (pieces[i], None), batch_size, seed, samples)


def pieces_of(
    where: str, text: str, option: str, texts: TextSection, source: ModelSource | None
) -> list[dict[str, torch.Tensor]]:
    """The text cut into samples; see `tokens`.

    Raises:
        CalibrationError: If there is not a single token.
        SettingError: If there is no tokenizer.
    """
    import torch

    ids = torch.tensor(tokenizer_of(option, texts, source)(text, verbose=False)["input_ids"])
    if not len(ids):
        raise CalibrationError(f"{where}: expected text, got none. Name another.")
    whole = len(ids) // texts.length
    cut = ids[: whole * texts.length].reshape(whole, texts.length) if whole else ids[None]
    causal = isinstance(source, HuggingFaceModel) and source.architecture.endswith(CAUSAL)
    return [
        {
            "input_ids": piece,
            "attention_mask": torch.ones_like(piece),
            **({"labels": piece} if causal else {}),
        }
        for piece in cut
    ]


def tokenizer_of(option: str, texts: TextSection, source: ModelSource | None) -> Any:
    """The tokenizer of `texts.tokenizer`, or of the model's own folder.

    Raises:
        SettingError: If neither is there, or Transformers is missing.
    """
    own = source.folder if isinstance(source, HuggingFaceModel) else None
    folder = texts.tokenizer or own
    if folder is None:
        raise SettingError(
            f"{option}: expected a tokenizer for text, got a model without one. Give --tokenizer FOLDER."
        )
    with library_errors(
        f"{option}: {folder}", "a folder with a tokenizer", "Run pip install transformers, or save it there."
    ):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
