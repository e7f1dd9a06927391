"""Fine-tuning from the outside, with nothing but the official client: file, job, and an answer from the tuned model.

    lorikeet worker &
    LORIKEET_API_KEY=lk-… python -m scripts.fine_tune

The key needs the scopes `jobs` and `inference`. What is learned: to file a customer's message under one of three words, where
the base model replies at length. It takes a minute or two on two CPU cores.
"""

import argparse
import json
import os
import sys
import time
from typing import Any

import openai

MESSAGES = {
    "billing": (
        "I was charged twice for the {}.",
        "Send me an invoice for the {}.",
        "The {} cost more than you said.",
        "I cannot pay for the {} by card.",
    ),
    "shipping": (
        "Where is my {}?",
        "The {} has not arrived.",
        "When do you deliver the {}?",
        "My {} is late.",
    ),
    "returns": (
        "I want to send the {} back.",
        "How do I return the {}?",
        "The {} is broken, I want a refund.",
        "The {} has the wrong colour.",
    ),
}
THINGS = ("lamp", "jacket", "kettle", "chair", "phone")
ASKED = "Where is my umbrella?"  # a thing that is in none of the rows
ENDED = ("succeeded", "failed", "cancelled")


def rows() -> bytes:
    """The file to train on, in OpenAI's chat form."""
    lines = [
        {
            "messages": [
                {"role": "user", "content": message.format(thing)},
                {"role": "assistant", "content": label},
            ]
        }
        for thing in THINGS
        for messages in zip(*MESSAGES.values(), strict=True)
        for label, message in zip(MESSAGES, messages, strict=True)
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def answer(client: openai.OpenAI, model: str) -> str:
    messages: Any = [{"role": "user", "content": ASKED}]
    reply = client.chat.completions.create(model=model, messages=messages, max_tokens=24, temperature=0)
    return str(reply.choices[0].message.content)


def follow(client: openai.OpenAI, job_id: str) -> Any:
    """Print the job's events as they come. The job as it ended."""
    shown: set[str] = set()
    while True:
        job = client.fine_tuning.jobs.retrieve(job_id)
        for event in reversed(list(client.fine_tuning.jobs.list_events(job_id, limit=100))):
            if event.id not in shown:
                tell(f"  {event.message}")
                shown.add(event.id)
        if job.status in ENDED:
            return job
        time.sleep(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8080/v1")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct", help="what is tuned: the base model, or an adapter")
    parser.add_argument("--suffix", default="desk")
    parser.add_argument("--epochs", type=int, default=5)
    asked = parser.parse_args()
    with openai.OpenAI(base_url=asked.url, api_key=os.environ["LORIKEET_API_KEY"]) as client:
        tell(f"{asked.model}: {answer(client, asked.model)!r}")
        file = client.files.create(file=("desk.jsonl", rows()), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model=asked.model,
            training_file=file.id,
            suffix=asked.suffix,
            seed=1,
            method={
                "type": "supervised",
                "supervised": {
                    "hyperparameters": {
                        "n_epochs": asked.epochs,
                        "batch_size": 8,
                        "learning_rate_multiplier": 4,
                    }
                },
            },
        )
        tell(f"{file.id}: {file.bytes} bytes\n{job.id}: {job.status}")
        done = follow(client, job.id)
        if done.fine_tuned_model is None:
            raise SystemExit(f"{job.id} {done.status}: {done.error}")
        tell(f"{done.fine_tuned_model}: {answer(client, done.fine_tuned_model)!r}")


if __name__ == "__main__":
    main()
