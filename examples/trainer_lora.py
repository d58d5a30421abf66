"""Next-sequence prediction inside a transformers Trainer, with LoRA adapters on every linear layer and the head.

    pip install peft accelerate
    python examples/trainer_lora.py my_book.txt

``refine.RefineTrainer`` is a ``transformers.Trainer`` whose loss is a REFINE step; its training arguments carry the
settings of ``refine.RefineConfig`` too. Rewards, entropies and losses are logged; rollouts are written beside the
true continuation into ``samples/``.
"""

import argparse
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

import refine

PACKAGED = Path(refine.__file__).parent / "assets" / "tiny-delta-net"


def main(arguments: list[str] | None = None) -> refine.RefineTrainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default=PACKAGED, help="a folder or a hub name")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/trainer-lora"))
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence")
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(options.text.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0]
    data = [{"input_ids": part} for part in ids.split(options.length) if len(part) == options.length]
    if len(data) < 2:
        sys.exit(f"{options.text} has {len(ids)} tokens, less than two sequences: give a smaller --length")

    model = refine.load_model(options.model, dtype=torch.float32)
    linears = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=sorted(linears), task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    model.print_trainable_parameters()

    trainer = refine.RefineTrainer(
        model,
        refine.RefineTrainingArguments(
            output_dir=str(options.output_dir),
            max_steps=options.max_steps,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            num_chunks=4,
            num_rollouts=2,
            reward="hybrid",
        ),
        train_dataset=data[:-1],
        eval_dataset=data[-1:],
        processing_class=tokenizer,
        data_collator=lambda rows: {"input_ids": torch.stack([row["input_ids"] for row in rows])},
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"next-token loss on the last part: {before:.3f} -> {trainer.evaluate()['eval_loss']:.3f}")
    model.save_pretrained(options.output_dir / "adapter")  # or: model.merge_and_unload().save_pretrained(...)
    return trainer


if __name__ == "__main__":
    main()
