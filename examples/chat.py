"""A conversation of two turns through the model's chat template.    python examples/chat.py [MODEL]"""

import sys

import skipstone

model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"
engine = skipstone.load(model)

messages = []
for question in ("Name three rivers in Europe.", "Which of them is the longest?"):
    messages.append({"role": "user", "content": question})
    answer = engine.chat(messages, max_new_tokens=48)
    messages.append({"role": "assistant", "content": answer.text})
    print(f"you:   {question}\nmodel: {answer.text.strip()}\n")
