"""Load the models and data that a user names on the command line. First checks need no torch."""

from secateur.cli.loading.data import check_data, example_of, load_data
from secateur.cli.loading.models import ModelSource, check_model, load_model, model_source
from secateur.cli.loading.target import Target

__all__ = [
    "ModelSource",
    "Target",
    "check_data",
    "check_model",
    "example_of",
    "load_data",
    "load_model",
    "model_source",
]
