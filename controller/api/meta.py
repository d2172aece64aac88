"""Names that appear outside this program. Each constant is written once, here, so that grep finds where it comes from."""

GROUP = "alignment.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "AlignmentRun"
PLURAL = "alignmentruns"
SINGULAR = "alignmentrun"
SHORT_NAMES = ("arun",)

RUN_NAME_LENGTH = 40
"""Run, phase and attempt together make a job's name, and pods add to it; 63 characters is Kubernetes' limit."""
PHASE_NAME_LENGTH = 30
MAX_PHASES = 64
DNS_LABEL = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"

# ---- labels on every child object and its pods
LABEL_NAME = "app.kubernetes.io/name"
LABEL_PART_OF = "app.kubernetes.io/part-of"
LABEL_COMPONENT = "app.kubernetes.io/component"
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
LABEL_RUN = f"{GROUP}/run"
LABEL_PHASE = f"{GROUP}/phase"
LABEL_ATTEMPT = f"{GROUP}/attempt"
ANNOTATION_DIGEST = f"{GROUP}/digest"
PRODUCT = "alignment-operator"

# ---- condition types
ACCEPTED = "Accepted"
PROGRESSING = "Progressing"
SUSPENDED = "Suspended"
STALLED = "Stalled"
SUCCEEDED = "Succeeded"
FAILED = "Failed"

# ---- condition reasons
VALID = "Valid"
"""Accepted: the run makes sense as a whole."""
INVALID_SPEC = "InvalidSpec"
"""Accepted is false: the message lists every problem."""
PHASES_RUNNING = "PhasesRunning"
"""Progressing: at least one phase has a live job."""
STARTING = "Starting"
"""Progressing: jobs were asked for and have not been seen yet."""
WAITING_FOR_CAPACITY = "WaitingForCapacity"
"""Progressing: phases could start, but as many as allowed are running."""
BACKING_OFF = "BackingOff"
"""Progressing: a failed phase waits before its next attempt."""
RUN_SUSPENDED = "RunSuspended"
"""Suspended: spec.suspend is true."""
PHASES_SUSPENDED = "PhasesSuspended"
"""Suspended: nothing is left to do but phases whose own suspend is true, and what needs them."""
NOT_SUSPENDED = "NotSuspended"
NO_PROGRESS = "NoProgress"
"""Stalled: a running phase has reported nothing for failurePolicy.stalledAfterSeconds."""
MAKING_PROGRESS = "MakingProgress"
ALL_PHASES_SUCCEEDED = "AllPhasesSucceeded"
PHASE_FAILED = "PhaseFailed"
"""Failed: a phase failed for good; the message names it, its failure class and what it said."""
DEADLINE_EXCEEDED = "DeadlineExceeded"
"""Failed: the run's or a phase's deadline has passed."""
NOT_FINISHED = "NotFinished"
FINISHED = "Finished"
