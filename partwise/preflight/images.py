"""Can the images be read, are they of a sensible size, and do they make the tokens that the model expects?

In: the scans of the context. Out: findings. Whether the model takes the images is for the step's check.
"""

from __future__ import annotations

from partwise.data.rows import count_images
from partwise.preflight.context import Context
from partwise.preflight.rows import Source, fault_findings, sources
from partwise.records import Finding

# Phones take up to 12 or 24 million pixels; beyond that is mostly a scan or a panorama by mistake.
LARGE_PIXELS = 25_000_000


def check_images(context: Context) -> list[Finding]:
    """Images can be decoded; which are turned by their EXIF tag, and which are enormous."""
    findings: list[Finding] = []
    for source in sources(context):
        findings += fault_findings("images", source, "images")
        if source.scan.num_images:
            findings += [*turned_images(source), *large_images(source), image_sizes(source)]
    return findings


def turned_images(source: Source) -> list[Finding]:
    number = sum(row.num_turned_images for row in source.scan.rows)
    if not number:
        return []
    first = next(row.name for row in source.scan.rows if row.num_turned_images)
    text = f"{source.key}: {count_images(number)} turned upright by the EXIF tag, the first in {first}"
    return [Finding("images", "info", text, source.where, values={"num_turned": number})]


def large_images(source: Source) -> list[Finding]:
    large = [
        (row.name, size)
        for row in source.scan.rows
        for size in row.image_sizes
        if size[0] * size[1] > LARGE_PIXELS
    ]
    if not large:
        return []
    name, (width, height) = large[0]
    text = (
        f"{source.key}: {len(large)} of {source.scan.num_images} images have more than "
        f"{LARGE_PIXELS // 10**6} million pixels, the first {width}x{height} in {name}"
    )
    fix = "Scale them down once: they are decoded anew in every epoch, and the model sees them smaller."
    return [Finding("images", "warning", text, source.where, fix, {"num_large": len(large)})]


def image_sizes(source: Source) -> Finding:
    sizes = sorted((size for row in source.scan.rows for size in row.image_sizes), key=lambda s: s[0] * s[1])
    (w, h), (wide, high) = sizes[0], sizes[-1]
    text = f"{source.key}: {count_images(len(sizes))} of {w}x{h} px"
    return Finding(
        "images", "info", text if sizes[0] == sizes[-1] else f"{text} to {wide}x{high}", source.where
    )


def check_image_tokens(context: Context) -> list[Finding]:
    """Each row has as many image tokens as the processor announces for images of these sizes."""
    findings: list[Finding] = []
    for source in sources(context):
        told = [row for row in source.scan.rows if row.num_announced_tokens is not None]
        wrong = [row for row in told if row.num_image_tokens != row.num_announced_tokens]
        if wrong:
            text = (
                f"{source.key}: {len(wrong)} of {len(told)} rows with images have another number of image "
                f"tokens than the processor announces: {wrong[0].num_image_tokens} instead of "
                f"{wrong[0].num_announced_tokens} in {wrong[0].name}"
            )
            fix = "Look at the row with preview; other tools may rely on the announced number."
            findings.append(Finding("image-tokens", "warning", text, source.where, fix))
        elif told:
            total = sum(row.num_image_tokens for row in told)
            text = f"{source.key}: {total:,} image tokens, as many as the processor announces"
            findings.append(Finding("image-tokens", "info", text, source.where))
    return findings
