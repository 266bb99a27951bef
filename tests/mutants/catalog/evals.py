"""Evaluations of frozen features."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

KNN = "fastdino/evals/knn.py"

MUTANTS = (
    Mutant(KNN, ".split(rows), max(ks))", ".split(rows), ks[-1])"),
    Mutant(KNN, ") / temperature).exp()", ") / 0.07).exp()"),
    Mutant(KNN, "best.values > 0", "best.values > -1"),
    Mutant(KNN, "temperature=args.temperature", "temperature=0.07"),
    Mutant(KNN, "center_crop(args.resize, args.crop)", "center_crop(256, args.crop)"),
    Mutant(KNN, "labels[indices]", "labels[: len(indices[0])].expand_as(indices)"),
    Mutant("fastdino/evals/descriptors.py", "moment += rows.T @ rows", "moment = rows.T @ rows"),
    Mutant(
        "fastdino/evals/linear_probe.py",
        "(labels != UNREADABLE).sum().clamp(min=1)",
        "(labels != UNREADABLE).sum()",
    ),
    Mutant(
        "fastdino/evals/attention_maps.py",
        "maps.flatten(-2).double().sort",
        "maps.flatten(-2).sort",
        equivalent="precision: in fp32 the sum of thousands of numbers can round across the share",
    ),
)
