"""Build and run one pre-training: tokenizer, windows, model, trainer, and the finished base with its card."""

from importlib.metadata import version
from pathlib import Path

import torch
from lightning.pytorch import seed_everything
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from lmoe.backbones.load import tokenizer_in
from lmoe.config.pretrain import PretrainConfig
from lmoe.config.trainer import max_seconds
from lmoe.data.order import ResumableLoader, SeededBatches
from lmoe.data.rows.row import Row
from lmoe.errors import CheckpointError
from lmoe.files.places import expanded
from lmoe.files.run_folder import METRICS_FILE
from lmoe.pretrain.bpe import END_OF_TEXT, PAD, TURN_END, train_bpe
from lmoe.pretrain.card import card_text, chat_losses, held_out_figures, write_card
from lmoe.pretrain.corpus import CHATS, DomainText, Windows, chats_within, encode_stream, read_chats, read_corpus
from lmoe.pretrain.module import PretrainModule
from lmoe.pretrain.progress import PretrainProgress
from lmoe.report.curves import read_metrics
from lmoe.report.pictures import write_loss_curve
from lmoe.report.say import say
from lmoe.resume.run_files import FOLDER, found_in, set_aside
from lmoe.resume.stopping import StopSignals
from lmoe.run.announce import quiet_libraries
from lmoe.run.claim import store_id, stored_id
from lmoe.run.devices import check_devices
from lmoe.run.loggers import build_loggers, check_logger, wandb_run_id
from lmoe.run.past_records import check_records
from lmoe.run.provenance import check_unchanged, provenance
from lmoe.run.records import write_records
from lmoe.run.run_end import logged_to_the_end, run_end
from lmoe.run.trainer import build_trainer
from lmoe.run.verb_call import VerbCall, Wording, resuming
from lmoe.training.callbacks.progress_line import ProgressLine
from lmoe.training.callbacks.rng_state import RngState
from lmoe.training.callbacks.run_checkpoint import RunCheckpoint
from lmoe.training.callbacks.stop_request import StopRequest, TakeSignals
from lmoe.training.step import in_stages

BASE = "base"


def pretrain(
    config: PretrainConfig,
    run_dir: Path,
    overrides: list[str],
    console: Console,
    signals: StopSignals,
    *,
    wording: Wording = str,
) -> None:
    """Train from scratch, or on from checkpoints/last.ckpt, and write the base with its card.

    Args:
        wording: how the command is said that goes on from here, and the one on the card.

    Raises:
        LmoeError: text that cannot be read, a folder that cannot be written, a checkpoint that does not fit.
        Stopped: a signal ended the run, and its checkpoint is written.
    """
    quiet_libraries()
    check_logger(config.logger)
    check_devices(config.trainer)
    seed_everything(config.seed, verbose=False)
    corpus, loop = config.corpus, config.trainer
    if config.resume:
        check_records(run_dir)
    folder, run_id = run_dir / FOLDER, stored_id(run_dir)
    found = found_in(folder, run_id, wanted=config.checkpoint.resume_from) if config.resume else None
    with_chats = bool(corpus.chats_path)
    texts = read_corpus(str(corpus.path), corpus.held_out_share, corpus.held_out_min_bytes, with_chats=with_chats)
    tokenizer = tokenizer_of(run_dir, texts, config)
    chats, hashes = read_chats(corpus.chats_path, corpus.chats_exclude) if corpus.chats_path else ([], {})
    windows, counts = training_windows(texts, chats, tokenizer, config)
    held_out = held_out_windows(texts, tokenizer, corpus.sequence_length)
    hashes |= {text.file: text.digest for text in texts}
    rows = windows.digests() + held_out.digests()
    if found is not None:
        check_unchanged(run_dir, hashes, rows, {})
    say(console, f"corpus: {sum(counts.values()):,} tokens in {len(counts)} parts, {len(held_out)} windows held out")
    model = base_model(config, tokenizer)
    val_loader = DataLoader(held_out, batch_size=16, generator=torch.Generator())
    domains = [text.name for text in texts]
    module = PretrainModule(model, config.optim, loop.max_steps, domains, val_loader, compile_model=loop.compile)
    if found is not None:
        set_aside(folder, found)
    run_id = store_id(run_dir, run_id or (None if found is None else found.run_id))
    record = provenance(seed=config.seed, overrides=overrides, verb="pretrain", data=hashes, rows=rows, backbone={})
    write_records(config, run_dir, record)
    loggers = build_loggers(config, run_dir, found, lambda line: say(console, line))
    batches = SeededBatches(len(windows), corpus.batch_size, loop.max_steps * loop.accumulate_grad_batches, config.seed)
    line = ProgressLine(loop.max_steps, console, enabled=loop.enable_progress_bar)
    line.done = 0 if found is None else found.step
    resume_command = wording(resuming("pretrain", run_dir))
    with logged_to_the_end(loggers, console, line, resume_command=resume_command):
        with line:
            each_step = [
                PretrainProgress(loop.log_every_n_steps, loop.val_every_n_steps, line),
                RunCheckpoint(folder, run_id, config.checkpoint, wandb_run_id(run_dir)),
            ]
            callbacks = [
                TakeSignals(signals),
                RngState(),
                *in_stages(each_step),
                StopRequest(signals, max_seconds(loop.max_time), line.say),
            ]
            trainer = build_trainer(loop, run_dir, loggers, callbacks)
            loader, path = (
                ResumableLoader(windows, batches, generator=torch.Generator()),
                None if found is None else found.path,
            )
            with signals.deferred():
                trainer.fit(module, loader, ckpt_path=path, weights_only=True)
            signals.check()
        if trainer.global_step < loop.max_steps:
            ended = run_end(trainer)
            say(
                console,
                f"ended after step {ended.step} of {loop.max_steps}: {ended.reason}; the base is written after the "
                f"last step, {resume_command} goes on",
            )
            return
        own = [o for o in overrides if not o.startswith(("resume=", "output=", "hydra."))]
        command = " ".join([wording(VerbCall(verb="pretrain", settings={})), *own])
        base = write_base(config, run_dir, model, tokenizer, texts, held_out, counts, command)
        say(console, f"base and card: {base}")


def tokenizer_of(run_dir: Path, texts: list[DomainText], config: PretrainConfig) -> PreTrainedTokenizerBase:
    """The run's tokenizer: trained once, then read back, so that a resumed run has the very same."""
    folder = run_dir / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        model = config.model
        train_bpe((t.train for t in texts), model.vocab_size, model.max_position_embeddings).save_pretrained(folder)
    tokenizer = tokenizer_in(folder)
    if tokenizer is None:
        raise CheckpointError(f"{folder}: tokenizer_config.json is missing; put it back, or start a new run")
    return tokenizer


def training_windows(
    texts: list[DomainText], chats: list[Row], tokenizer: PreTrainedTokenizerBase, config: PretrainConfig
) -> tuple[Windows, dict[str, int]]:
    """Windows of every domain and of the chats, and the number of tokens of each.

    Args:
        chats: in the order in which they are taken, as far as corpus.chats_share goes.
    """
    streams = {t.name: encode_stream([END_OF_TEXT, t.train], tokenizer.encode) for t in texts}
    if config.corpus.chats_path:

        def render(row: Row) -> str:
            return str(tokenizer.apply_chat_template(list(row.messages or ()), tokenize=False))

        text_tokens = sum(len(s) for s in streams.values())
        share = config.corpus.chats_share
        streams[CHATS] = chats_within(chats, render, tokenizer.encode, int(text_tokens * share / (1 - share)))
    counts = {name: len(stream) for name, stream in streams.items()}
    return Windows(streams, config.corpus.sequence_length, keep_tail=False), counts


def held_out_windows(texts: list[DomainText], tokenizer: PreTrainedTokenizerBase, length: int) -> Windows:
    """Windows over every held-out tail, each token predicted once."""
    streams = {t.name: encode_stream([END_OF_TEXT, t.held_out], tokenizer.encode) for t in texts}
    return Windows(streams, length, keep_tail=True)


def base_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    """A Qwen3 model with random weights and tied embeddings."""
    model = config.model
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            num_hidden_layers=model.num_hidden_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_key_value_heads,
            head_dim=model.head_dim,
            max_position_embeddings=model.max_position_embeddings,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.convert_tokens_to_ids(TURN_END),
            pad_token_id=int(tokenizer.convert_tokens_to_ids(PAD)),  # type: ignore[arg-type]
            bos_token_id=None,
        )
    )


def write_base(
    config: PretrainConfig,
    run_dir: Path,
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[DomainText],
    held_out: Windows,
    counts: dict[str, int],
    command: str,
) -> Path:
    """bfloat16 safetensors, tokenizer, loss curve and card; the figures are those of the rounded weights."""
    folder = expanded(config.output) if config.output else run_dir / BASE
    model.to(dtype=torch.bfloat16)  # type: ignore[call-arg]
    model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o644)  # safetensors ignores the umask
    tokenizer.save_pretrained(folder)
    shipped = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    steps = config.trainer.max_steps * config.trainer.accumulate_grad_batches
    write_loss_curve(read_metrics(run_dir / METRICS_FILE), config.trainer.max_steps, folder / "loss_curve.png")
    text = card_text(
        model=shipped,
        token_counts=counts,
        tokens_seen=steps * config.corpus.batch_size * config.corpus.sequence_length,
        held_out=held_out_figures(shipped, texts, held_out),
        chats=chat_losses(shipped, tokenizer, config.eval_sft) if config.eval_sft else {},
        command=command,
        versions=f"torch {version('torch')}, transformers {version('transformers')}, lightning {version('lightning')}",
    )
    write_card(folder, text)
    return folder
