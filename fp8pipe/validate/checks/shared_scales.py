"""Per-tensor weight scales, and which fused siblings share one."""

from __future__ import annotations

from fp8pipe.validate.subject import Subject


def weight_scale_of(subject: Subject, module: str) -> float | None:
    """The module's one weight scale; None if it has several, or if the scale or the weight has a fault."""
    spec, weight = subject.specs.get(module), subject.weight(module)
    if spec is None or weight is None or spec.strategy != "tensor":
        return None
    if (shape := subject.source_shape(module)) is not None and weight.shape != spec.stored(shape):
        return None
    scale = subject.measured.scales.get(f"{module}.{spec.scale}")
    return scale.value if scale is not None and scale.entry.shape in ((1,), ()) else None


def sharing_group(subject: Subject, module: str) -> tuple[str, ...] | None:
    """The members of the module's fused group with the same per-tensor scale, so that their joint maximum made it.

    None if a member's scale is missing or misshapen, so that nobody can tell whose maximum it was."""
    if subject.specs[module].strategy != "tensor":
        return (module,)
    scale = weight_scale_of(subject, module)
    members = [m for m in subject.layout.group_of.get(module, (module,)) if m in subject.specs]
    scales = {member: other for member in members if (other := weight_scale_of(subject, member)) is not None}
    if scale is None or len(scales) < len(members):
        return None
    return tuple(member for member, other in scales.items() if other == scale)
