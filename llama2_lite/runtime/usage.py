"""Help texts of the training commands, which must not import what they describe."""

USAGE = {
    "pretrain": """\
usage: llama2-lite pretrain --config NAME_OR_FILE [--key value ...]

Train a Llama from the built-in town or from your own .txt, .jsonl or .parquet files.
Stopped at any moment, the same command continues.

  --config NAME_OR_FILE    town, text, 15m, 110m, 1b, 7b, 13b, 34b, 70b, or a YAML file;
                           may be given several times
  --output FOLDER          of the run: checkpoints, logs, and model/ at the end
  --data.files PATTERN     what to read, or '[a.txt, b/*.jsonl]'; the town if left out
  --data.text_field NAME   JSON key or Parquet column with the text (text)
  --data.vocab_size N      of the tokenizer that is trained
  --data.tokenizer FILE    a SentencePiece model to use instead
  --data.validation_fraction X   of the text, at its end, that is held out (0.1)
  --data.lengths '[[1.0, 256, 16]]'   share, sequence length and windows of a batch
  --model.config.dim N     and n_layers, n_heads, n_kv_heads, hidden_dim, max_seq_len
  --model.peak_lr X        and warmup, weight_decay, clip_norm
  --trainer.max_steps N    and every other argument of Lightning's Trainer
  --prompts 'ROMEO:'       what the samples continue, or '["ROMEO:", "JULIET:"]'
  --seed N                 of the weights and the order of the data (0)
  --force                  delete another run that the folder holds
  --checkpoint_every N     steps (500); the newest two stay, or --keep_checkpoints N
  --trainer.devices N      processes, one for each device; --trainer.num_nodes of hosts
  --layout.shard N         processes that share one copy of the model (0: all)
  --layout.tensor N        processes that share each matrix product (1)
  --layout.checkpoint_activations true   less memory, a third more work
  --layout.compile true    compiled blocks
  --batch_tokens N         of a batch over all processes, such as 4M, instead of windows
  --device_batch N         windows a process takes at a time; gradients accumulate
  --stop_within SECONDS    after Ctrl-C or SIGTERM: time to finish a step and save (25)
  --print_config           all keys with their values; =comments explains them
""",
    "sft": """\
usage: llama2-lite sft --config sft --start FOLDER --data.files PATTERN ...

Fine-tune a model on dialogues: it learns the answers.
{shared}
  --data.files PATTERN     .jsonl, .json or .parquet, or a list '[a.jsonl, b/*.json]':
                           messages, Alpaca, OpenAssistant, or the chosen answers of
                           preference pairs
  --data.epochs X          how often each dialogue is learned (2)
  --data.batch_size N      windows of a batch
  --data.sequence_length N of a window; the model's context if left out
  --data.train_on all|last answers of a dialogue
  --data.validation_fraction X   of the prompts, held out (0.1)
  --model.peak_lr X        and warmup, weight_decay, clip_norm
  --model.separate true|false   whether dialogues of a window see each other (true: no)
  --prompts 'Hello'        what to answer at the end, or '["Hello", "Who?"]'
""",
    "reward": """\
usage: llama2-lite reward --config reward --start FOLDER --data.files PATTERN ...

Train a reward model on preference pairs, from a chat model.
{shared}
  --data.files PATTERN     .jsonl, .json or .parquet, or a list '[a.jsonl, b/*.json]':
                           prompt, chosen and rejected, HH-RLHF, PKU-SafeRLHF,
                           OpenAssistant, or Alpaca with chosen and rejected; level and
                           safety_bin where they are known
  --data.axis helpfulness|safety   what the pairs are about
  --data.other_files PATTERN       pairs about the other axis, to mix in
  --data.own_share X       of the mix that is about this axis (0.5)
  --data.margins none|small|large  by level; 0 where there is none
  --data.epochs X          how often each pair is learned (1)
  --data.batch_size N      pairs of a batch
  --data.sequence_length N of a dialogue; the model's context if left out
  --data.validation_fraction X     of the prompts, to choose the best step by; and as
                           many to report on (0.1)
  --model.safety_weight X  of the auxiliary safety loss, where safety is known (0)
  --model.likelihood_weight X  of the least likely token's log-probability in the
                           score (0)
  --model.next_token_weight X  of the next-token loss that keeps it true (0)
  --model.peak_lr X        and weight_decay, clip_norm
""",
    "reject": """\
usage: llama2-lite reject --config reject --start FOLDER --data.files PATTERN ...

Answer prompts several times, keep the best answers by reward models, and learn them.
{shared}
  --data.files PATTERN     prompts, or any files of dialogues or preference pairs
  --data.safety_files PATTERN   more of them, for which the safety model decides
  --data.helpfulness FOLDER     of a reward model; and --data.safety FOLDER. Of both,
                           safety decides where it is below 0.15 or the prompt is of
                           the safety files; one may be left out
  --data.sampler FOLDER    of the model that answers, such as a larger one (--start)
  --data.earlier PATTERN   sampled/dialogs.jsonl of earlier rounds, to choose from too
  --data.k N               answers to each prompt (8)
  --data.temperatures '[1.0]'   of the sampling; of several, the best rewarded
  --data.max_new_tokens N  longest answer (64); one that is cut there is not picked
  --data.epochs X          and batch_size, sequence_length, validation_fraction
  --model.peak_lr X        and warmup, weight_decay, clip_norm, separate
  --prompts 'Hello'        what to answer at the end, or '["Hello", "Who?"]'
""",
    "ppo": """\
usage: llama2-lite ppo --config ppo --start FOLDER --data.files PATTERN ...

Reinforcement learning: a chat model learns from the rewards for its own answers.
{shared}
  --data.files PATTERN     prompts, or any files of dialogues or preference pairs
  --data.safety_files PATTERN   more of them, for which the safety model decides
  --model.helpfulness FOLDER    of a reward model; and --model.safety FOLDER. Of both,
                           safety decides where it is below 0.15 or the prompt is of
                           the safety files; one may be left out
  --data.batch_size N      prompts of an iteration; --trainer.max_steps is their number
  --data.validation_prompts N   held out; the best model by their reward is kept
  --model.settings.lr X    and critic_lr, kl_weight, clip, minibatch_size, gamma, lam,
                           critic, cut_penalty, max_new_tokens, weight_decay, clip_norm
""",
    "gatt": """\
usage: llama2-lite gatt --config gatt --start FOLDER --data.files PATTERN ...

Ghost Attention: a chat model learns to keep to a system message over many turns.
{shared}
  --data.files PATTERN     dialogues of several turns, without system messages
  --data.instructions PATTERN   .jsonl or .json of {"text", "short", "pattern"}: system
                           messages, in few words, and what an answer that obeys must
                           match; the town's if left out
  --data.sampler FOLDER    of the model that replies, told at every turn (--start)
  --data.combined X        share of dialogues with two instructions (0.2)
  --data.plain X           share of dialogues without (0.1)
  --data.max_new_tokens N  longest reply (64); and temperature (1)
  --data.epochs X          and batch_size, sequence_length, validation_fraction
  --model.peak_lr X        and warmup, weight_decay, clip_norm
""",
}

SHARED = """\
Stopped at any moment, the same command continues.

  --config NAME_OR_FILE    {name}, or a YAML file; may be given several times
  --start FOLDER           of the model to start from
  --output FOLDER          of the run: checkpoints, logs, and model/ at the end
  --skip-bad               drop and count bad samples instead of stopping at the first
  --trainer.max_steps N    and every other argument of Lightning's Trainer
  --seed N                 of what is held out and the order of the data (0)
  --force                  delete another run that the folder holds
  --checkpoint_every N     steps (500); the newest two stay, or --keep_checkpoints N
  --trainer.devices N      processes, one for each device; --trainer.num_nodes of hosts
  --layout.shard N         processes that share one copy of the model (0: all)
  --layout.tensor N        processes that share each matrix product (1)
  --layout.checkpoint_activations true   less memory, a third more work
  --layout.compile true    compiled blocks
  --device_batch N         windows a process takes at a time; gradients accumulate
  --stop_within SECONDS    after Ctrl-C or SIGTERM: time to finish a step and save (25)
  --print_config           all keys with their values; =comments explains them
"""

SUMMARIES = {
    "pretrain": "train a Llama from the town or from your own files",
    "sft": "fine-tune a model on dialogues",
    "reward": "train a reward model on preference pairs",
    "reject": "learn the best of several answers, by reward models",
    "ppo": "learn from rewards for one's own answers",
    "gatt": "learn to keep to a system message over many turns",
}


def usage(name: str) -> str:
    """The help of a command."""
    lines = SHARED.format(name=name).splitlines(keepends=True)
    if name == "ppo":  # which has minibatches instead
        lines = [line for line in lines if "--device_batch" not in line]
    return USAGE[name].replace("{shared}\n", "".join(lines))
