# The three commands of the README. Without make, see "Without make" there.
PY = .venv/bin/python
MARK = .venv/.installed

demo: $(MARK)
	$(PY) sample.py --image assets/face.png --audio assets/speech.wav --out out.mp4

test: $(MARK)
	$(PY) -m pytest -q tests

train: $(MARK)
	$(PY) detector.py --out runs/detector
	$(PY) train_vae.py --out runs/vae
	$(PY) train_diffusion.py --vae runs/vae/vae.pt --out runs/diffusion
	$(PY) evaluate.py --checkpoint runs --json runs/evaluation.json

$(MARK): requirements.txt
	python3 -m venv .venv
	$(PY) -m pip install -q -r requirements.txt
	touch $(MARK)

.PHONY: demo test train
