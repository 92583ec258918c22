"""A streamed conversation about an image.

python examples/chat_with_images.py MODEL IMAGE QUESTION...      MODEL is a folder, a run ID or models:/NAME/1
"""

import sys

import mmphi


def main(model: str, image: str, *questions: str) -> None:
    loaded = mmphi.load(model)
    messages = []
    for number, question in enumerate(questions):
        content = [{"type": "text", "text": question}]
        messages.append(
            {"role": "user", "content": [{"type": "image", "image": image}, *content] if not number else content}
        )
        print(f"> {question}")
        pieces = []
        for piece in loaded.stream(messages, max_tokens=48):
            print(piece, end="", flush=True)
            pieces.append(piece)
        print()
        messages.append({"role": "assistant", "content": "".join(pieces)})


if __name__ == "__main__":
    main(*sys.argv[1:])
