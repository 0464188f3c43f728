import sys
from pathlib import Path
from ldm.train.vae import train_vae
train_vae(Path(sys.argv[1]), Path(sys.argv[2]))
