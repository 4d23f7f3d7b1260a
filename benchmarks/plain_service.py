"""The service that people write around a fine-tuned Whisper: FastAPI, PEFT, one request after the other.

    python benchmarks/plain_service.py --model MODEL --adapters FOLDER --how generate --port 8001

Adapters are loaded when they are first asked for and kept; `set_adapter` chooses one for each request, under a lock.
--how generate: the feature extractor pads to 30 s and transformers' `generate` decodes, as in most examples.
--how swap: the same service with Resonance's audio context and decoding: all that is left to gain is batching.
"""

from __future__ import annotations

import argparse
import io
import threading
from pathlib import Path
from typing import Any

import soundfile
import torch
import uvicorn
from fastapi import FastAPI, Form, UploadFile
from peft import PeftModel

from resonance.data.audio_context import AudioContext
from resonance.data.batches import batch_features
from resonance.model.load import load_whisper
from resonance.model.lora import quiet_peft
from resonance.transcribe.decoding import decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--how", choices=("generate", "swap"), required=True)
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    uvicorn.run(service(given), host="127.0.0.1", port=given.port, log_level="warning")


def service(given: argparse.Namespace) -> FastAPI:
    whisper = load_whisper(given.model, device=torch.device("cpu"))
    lock = threading.Lock()
    tuned: Any = None
    loaded: set[str] = set()
    prompt = [whisper.tokenizer.convert_tokens_to_ids(token) for token in PROMPT]
    context = AudioContext("auto", 0.6)

    def choose(patient: str) -> Any:
        nonlocal tuned
        if patient not in loaded:
            with quiet_peft():
                if tuned is None:
                    tuned = PeftModel.from_pretrained(whisper.model, given.adapters / patient, adapter_name=patient)
                else:
                    tuned.load_adapter(given.adapters / patient, adapter_name=patient)
            tuned.eval()
            loaded.add(patient)
        tuned.set_adapter(patient)
        return tuned

    app = FastAPI()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/transcribe")
    def transcribe(file: UploadFile, patient_id: str = Form()) -> dict[str, str]:
        audio, rate = soundfile.read(io.BytesIO(file.file.read()), dtype="float32")
        with lock, torch.inference_mode():
            model = choose(patient_id)
            if given.how == "generate":
                features = whisper.feature_extractor(audio, sampling_rate=rate, return_tensors="pt").input_features
                ids = model.generate(input_features=features, language="en", task="transcribe")
            else:
                ids = decode(model, batch_features([audio], context, whisper.n_mels), [prompt])
            return {"text": whisper.tokenizer.decode(ids[0], skip_special_tokens=True).strip()}

    return app


PROMPT = ("<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>")


if __name__ == "__main__":
    main()
