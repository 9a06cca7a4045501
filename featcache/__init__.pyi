from .errors import FeatcacheError as FeatcacheError
from .extraction.extract import extract as extract
from .finetuning.settings import SuffixSettings as SuffixSettings
from .fingerprint import Fingerprint as Fingerprint
from .images.image_set import ImageSet as ImageSet
from .networks.backbone import Backbone as Backbone
from .networks.backbone import backbones as backbones
from .networks.taps import Tap as Tap
from .pixels.preprocessing import Preprocessing as Preprocessing
from .pixels.views import Augmentation as Augmentation
from .predictor.predictions import Prediction as Prediction
from .predictor.predictor import Predictor as Predictor
from .report.data import write_report as write_report
from .report.plots import plot_confusion as plot_confusion
from .report.plots import plot_embedding as plot_embedding
from .report.plots import plot_leaderboard as plot_leaderboard
from .report.plots import plot_learning_curve as plot_learning_curve
from .report.plots import plot_reliability as plot_reliability
from .results.evaluation import Evaluation as Evaluation
from .results.leaderboard import Leaderboard as Leaderboard
from .store.store import FeatureStore as FeatureStore
from .study.evaluate import evaluate as evaluate
from .study.learning_curve import LearningCurve as LearningCurve
from .study.learning_curve import learning_curve as learning_curve
from .study.run import train_files as train_files
from .study.train import train as train

__version__: str
