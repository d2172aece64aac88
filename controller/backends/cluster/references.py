"""Owner references: which one says who manages a thing, and of which API group that is."""

from collections.abc import Iterable, Mapping
from typing import Any

from controller.api import meta

Object = dict[str, Any]


def reference(run: str, uid: str) -> Object:
    """What makes something a run's: it goes when the run goes."""
    return {"apiVersion": meta.API_VERSION, "kind": meta.KIND, "name": run, "uid": uid, "controller": True}


def controller_of(thing: Mapping[str, Any]) -> Object:
    """The one owner reference that says who manages it; empty if nobody does."""
    owners: Iterable[Object] = thing["metadata"].get("ownerReferences") or ()
    return next((owner for owner in owners if owner.get("controller")), {})


def group_of(owner: Mapping[str, Any]) -> str:
    group, _, version = str(owner.get("apiVersion", "")).partition("/")
    return group if version else ""
