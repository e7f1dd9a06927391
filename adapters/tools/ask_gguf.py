"""Ask a GGUF file in llama.cpp. Runs in the environment `gguf.txt` describes; imports nothing of ours.

One argument, JSON: model (file), prompts (lists of token ids), max_tokens, context (tokens), threads, out (file). Writes to
`out` a list of {"text", "finish_reason", "tokens"}, one a prompt, greedy.
"""

import ctypes
import json
import signal
import sys

PROGRESS = "@lorikeet "
PR_SET_PDEATHSIG = 1


def tell(step: str, done: int = 0, total: int = 0) -> None:
    sys.stdout.write(f"{PROGRESS}{json.dumps([step, done, total])}\n")
    sys.stdout.flush()


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # who asked was killed: nobody waits for the answers
    asked = json.loads(sys.argv[1])
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = asked["model"]
    params.n_ctx = asked["context"]
    params.n_parallel = 1
    params.warmup = False
    params.cpuparams.n_threads = asked["threads"]
    tell("loading into llama.cpp")
    server = xllamacpp.Server(params)
    answers = []
    for done, prompt in enumerate(asked["prompts"]):
        tell("asking llama.cpp", done, len(asked["prompts"]))
        body = {"prompt": prompt, "max_tokens": asked["max_tokens"], "temperature": 0, "top_k": 1}
        body |= {"repeat_penalty": 1.0, "cache_prompt": False}
        answer = server.handle_completions(body)
        if "choices" not in answer:
            raise SystemExit(f"llama.cpp refuses a prompt: {json.dumps(answer)[:500]}")
        choice = answer["choices"][0]
        answers.append(
            {
                "text": choice["text"],
                "finish_reason": choice["finish_reason"],
                "tokens": answer["usage"]["completion_tokens"],
            }
        )
    with open(asked["out"], "w", encoding="utf-8") as file:  # noqa: PTH123
        json.dump(answers, file)
    tell("asked", 1, 1)


if __name__ == "__main__":
    main()
