"""What CloudWatch reads from the log of a training: names of metrics and the patterns of their numbers."""

from __future__ import annotations

# Found in lines such as
#   step 10/150 · loss 3.2728 · learning rate 6.00e-04 · 0.9 clips/s · memory 1.91 (peak 1.95) GiB · 20.9 min left
#   step 50: WER 44.7%, phrases exactly right 44.4%, loss 2.1517  (best so far)
PATTERNS = {
    "train:loss": r"step [0-9]+/[0-9]+ .*loss ([0-9.]+)",
    "train:learning_rate": r"learning rate ([0-9.]+e[+-][0-9]+)",
    "train:samples_per_second": r"([0-9.]+) clips/s",
    "train:memory_gib": r"memory ([0-9.]+) \(peak",
    "train:peak_memory_gib": r"\(peak ([0-9.]+)\) GiB",
    "validation:loss": r"step [0-9]+: .*loss ([0-9.]+)",
    "validation:wer_percent": r"step [0-9]+: WER ([0-9.]+)%",
    "validation:cer_percent": r"step [0-9]+: CER ([0-9.]+)%",
    "validation:mer_percent": r"step [0-9]+: MER ([0-9.]+)%",
    "validation:phrases_right_percent": r"phrases exactly right ([0-9.]+)%",
}


def definitions() -> list[dict[str, str]]:
    """The patterns as CreateTrainingJob takes them."""
    return [{"Name": name, "Regex": pattern} for name, pattern in PATTERNS.items()]
