"""Fine-tunes RoBERTa on RTE or CoLA over a client and a server, as the documents do.

GLUE's files are read as they come (RTE/train.tsv and so on, or RTE-train.tsv). AdamW with a polynomial decay, a
learning rate of 2e-5 and the documents' four partitionings are options. `--model tiny` is a small RoBERTa with
random weights and a tokenizer made from the training sentences: it needs no download, and learns little.

    python examples/nlp.py rte --data ~/glue --compressor uniform8 --log out/uniform8
    python examples/nlp.py cola --data ~/glue --compressor fastquant --bits 6 --condition 3 --chunks 4
    python examples/nlp.py rte --data ~/glue --model tiny --epochs 2

A run that was stopped goes on with the same command.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from experiment import Batch, Log, Task, console, draw, index_batches, spelled, summary, train
from sklearn.metrics import matthews_corrcoef
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    get_polynomial_decay_schedule_with_warmup,
)

import fxsplit

LAYER = "roberta.encoder.layer"
CONDITIONS = {
    1: (f"{LAYER}.1", f"{LAYER}.11"),
    2: (f"{LAYER}.0.attention.output", f"{LAYER}.11"),
    3: (f"{LAYER}.0.attention.output", "classifier"),
    4: (f"{LAYER}.0", "classifier"),
}
"""The modules with which the server's part and the client's second part begin."""

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Sentences = list[tuple[str, str | None, int]]
"""First sentence, second one if there is one, and label."""


class Name(StrEnum):
    """The tasks of GLUE."""

    RTE = "rte"
    COLA = "cola"


def load(name: Name, data: Path, split: str) -> Sentences:
    """The sentences of a file of GLUE."""
    title = {Name.RTE: "RTE", Name.COLA: "CoLA"}[name]
    places = (data / title / f"{split}.tsv", data / f"{title}-{split}.tsv")
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise typer.BadParameter(f"neither {places[0]} nor {places[1]} is there", param_hint="--data")
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row]
    try:
        if name is Name.COLA:
            return [(row[3], None, int(row[1])) for row in rows]
        return [(row[1], row[2], int(row[3] == "entailment")) for row in rows[1:]]
    except (IndexError, ValueError) as error:
        raise typer.BadParameter(f"{path} is not as GLUE's {title} is: {error}", param_hint="--data") from error


def tiny(sentences: Sentences) -> tuple[Any, Any]:
    """A small RoBERTa with random weights, and a tokenizer made from some sentences."""
    trained = ByteLevelBPETokenizer()
    texts = [text for first, second, _ in sentences for text in (first, second) if text]
    trained.train_from_iterator(texts, vocab_size=1000, special_tokens=list(SPECIAL), show_progress=False)
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), SPECIAL, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, **names)
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_attention_heads=4, intermediate_size=64,
        num_hidden_layers=12, max_position_embeddings=130, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return RobertaForSequenceClassification(config), tokenizer


def batches(
    rows: Sentences, tokenizer: Any, length: int, size: int, generator: torch.Generator | None
) -> Iterator[Batch]:
    """Tokens, mask and labels; see `index_batches`."""
    for indices in index_batches(len(rows), size, generator):
        chosen = [rows[i] for i in indices]
        texts = [[row[0] for row in chosen]] + ([[row[1] for row in chosen]] if chosen[0][1] is not None else [])
        encoded = tokenizer(*texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        yield inputs, torch.tensor([row[2] for row in chosen])


def logits_of(output: Any) -> Tensor:
    """The class scores."""
    scores: Tensor = output.logits
    return scores


@app.command()
def main(
    task: Annotated[Name, typer.Argument(help="What is learned.")],
    data: Annotated[Path, typer.Option(help="Folder of GLUE's files.")],
    model: Annotated[str, typer.Option(help="Name or folder of a RoBERTa, or tiny.")] = "roberta-base",
    condition: Annotated[int, typer.Option(min=1, max=4, help="Partitioning of the documents.")] = 2,
    compressor: Annotated[str, typer.Option(help="Compressor of both cuts; none for none.")] = "none",
    bits: Annotated[int | None, typer.Option(help="Quantization bits, if not in the compressor's name.")] = None,
    split: Annotated[int | None, typer.Option(help="Split bits of sort and fast quantization.")] = None,
    chunks: Annotated[int, typer.Option(min=1, help="Micro-batches of a batch.")] = 4,
    devices: Annotated[
        str, typer.Option(help="Client, server and client, with commas; a/cpu+b/cpu: two servers.")
    ] = "cpu,server/cpu,cpu",
    epochs: Annotated[int, typer.Option(min=1)] = 20,
    batch_size: Annotated[int, typer.Option(min=2)] = 32,
    length: Annotated[int, typer.Option(min=8, max=512, help="Tokens of a sample.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="The peak.")] = 2e-5,
    weight_decay: Annotated[float, typer.Option()] = 1e-4,
    warm_up: Annotated[float, typer.Option(min=0, max=1, help="Share of the steps to the peak.")] = 0.06,
    samples: Annotated[int | None, typer.Option(help="Only the first so many training samples.")] = None,
    seed: Annotated[int, typer.Option(help="Of new weights, order and dropout.")] = 0,
    log: Annotated[Path, typer.Option(help="Folder of log, curves and checkpoint.")] = Path("out/nlp"),
    compare: Annotated[list[Path] | None, typer.Option(help="Logs of other runs, for the curves.")] = None,
) -> None:
    """Fine-tune RoBERTa over a client and a server."""
    name = spelled(compressor, bits, split)
    training, validation = load(task, data, "train")[:samples], load(task, data, "dev")
    steps = len(training) // batch_size
    if steps == 0 or chunks > batch_size:
        raise typer.BadParameter("a batch needs as many samples as chunks, and the data at least a batch")
    settings = {
        "model": model, "dataset": task.value, "condition": condition, "compressor": name, "chunks": chunks,
        "devices": devices, "batch_size": batch_size, "length": length, "learning_rate": learning_rate,
        "weight_decay": weight_decay, "warm_up": warm_up, "samples": samples, "epochs": epochs, "seed": seed,
    }  # fmt: skip
    try:
        lines = Log(log, settings)
        torch.manual_seed(seed)
        if model == "tiny":
            network, tokenizer = tiny(training)
        else:
            network = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
            tokenizer = AutoTokenizer.from_pretrained(model)
        work = Task(
            f"{model} on {task.value}",
            partial(batches, training, tokenizer, length, batch_size),
            partial(batches, validation, tokenizer, length, batch_size, None),
            logits_of,
            cross_entropy,
            ("Matthews", lambda guess, label: float(matthews_corrcoef(label, guess))),
        )
        example, _ = next(work.batches(torch.Generator()))
        options: dict[str, Any] = {"cuts": CONDITIONS[condition], "chunks": chunks, "compressor": name}
        with fxsplit.compile(network, devices.split(","), example_inputs=dict(example), **options) as pipe:
            optimizer = pipe.optimizer(torch.optim.AdamW, lr=learning_rate, weight_decay=weight_decay)
            schedule = get_polynomial_decay_schedule_with_warmup(
                optimizer, int(warm_up * epochs * steps), epochs * steps
            )
            train(pipe, work, optimizer, schedule, lines, settings, epochs, seed)
        console.print(summary(lines, "Matthews"))
        draw([lines.path, *(compare or [])], work.name, log / "curves.png")
    except (fxsplit.FxsplitError, OSError) as error:  # OSError: a model that is not there
        console.print(str(error), style="red", soft_wrap=True)
        raise typer.Exit(1) from error
    console.print(f"log and curves: {log}", soft_wrap=True)


if __name__ == "__main__":
    app()
