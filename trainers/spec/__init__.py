"""What a user can write in an AlignmentRun's phases: the models shared by every phase type.

This package and every ``phases/*/spec.py`` import no torch, so the controller can read a run without it.
YAML keys are camelCase, Python names snake_case. Unknown keys are errors.
"""

from trainers.spec.base import SpecModel, find_models, identifying, is_address, members_set, require_one, shrunk
from trainers.spec.data import (
    MAX_SOURCES,
    DataSource,
    HubDataset,
    MixedSource,
    PromptData,
    RowPolicy,
    SyntheticData,
    TrainData,
    check_mixture,
)
from trainers.spec.models import (
    LARGEST_TEMPLATE,
    ArtifactKind,
    ArtifactRef,
    ChatSettings,
    Dtype,
    ModelRef,
    NamedModel,
    RespondingModel,
    RewardModelRef,
    ScratchModel,
    ScratchTokenizer,
    TracesRef,
    shown_labels,
)
from trainers.spec.parallel import DeepSpeed, Fsdp, Parallel
from trainers.spec.phase import (
    Checkpoint,
    Evaluation,
    Gate,
    ModelPhaseSpec,
    PhaseSpec,
    Sampling,
    Tracking,
    TrainingSpec,
    addresses,
    check_engine,
    model_sources,
)
from trainers.spec.served import Served
from trainers.spec.training import Duration, Lora, Optim

__all__ = [
    "LARGEST_TEMPLATE",
    "MAX_SOURCES",
    "ArtifactKind",
    "ArtifactRef",
    "ChatSettings",
    "Checkpoint",
    "DataSource",
    "DeepSpeed",
    "Dtype",
    "Duration",
    "Evaluation",
    "Fsdp",
    "Gate",
    "HubDataset",
    "Lora",
    "MixedSource",
    "ModelPhaseSpec",
    "ModelRef",
    "NamedModel",
    "Optim",
    "Parallel",
    "PhaseSpec",
    "PromptData",
    "RespondingModel",
    "RewardModelRef",
    "RowPolicy",
    "Sampling",
    "ScratchModel",
    "ScratchTokenizer",
    "Served",
    "SpecModel",
    "SyntheticData",
    "TracesRef",
    "Tracking",
    "TrainData",
    "TrainingSpec",
    "addresses",
    "check_engine",
    "check_mixture",
    "find_models",
    "identifying",
    "is_address",
    "members_set",
    "model_sources",
    "require_one",
    "shown_labels",
    "shrunk",
]
