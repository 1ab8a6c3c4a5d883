"""The artifact: a folder that makes the training model again."""

from fxcollab.artifact.artifact import load, load_head, save
from fxcollab.artifact.folder import refuse_existing
from fxcollab.artifact.plan_file import read_plan
from fxcollab.artifact.weights import load_state_dict, refuse_existing_file, write_state_dict

__all__ = [
    "load",
    "load_head",
    "load_state_dict",
    "read_plan",
    "refuse_existing",
    "refuse_existing_file",
    "save",
    "write_state_dict",
]
