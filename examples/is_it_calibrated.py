"""Is a classifier calibrated? Its error with its floor, the diagram, and what recalibration does."""

from sklearn.datasets import make_classification
from sklearn.model_selection import train_test_split
from sklearn.naive_bayes import GaussianNB

from planish.metrics import SmoothCalibrationDisplay, SmoothRecalibrator, assess_calibration

x, y = make_classification(6000, n_features=20, n_informative=4, n_redundant=12, random_state=0)
x, x_test, y, y_test = train_test_split(x, y, test_size=2000, random_state=0)
x, x_own, y, y_own = train_test_split(x, y, test_size=2000, random_state=0)  # to recalibrate on

model = GaussianNB().fit(x, y)  # takes features for independent, and so is too sure
recalibrator = SmoothRecalibrator().fit(model.predict_proba(x_own)[:, 1], y_own)

before = model.predict_proba(x_test)[:, 1]
after = recalibrator.transform(before)
print("as it is:     ", assess_calibration(y_test, before))
print("recalibrated: ", assess_calibration(y_test, after))

display = SmoothCalibrationDisplay.from_predictions(y_test, before, name="naive Bayes")
SmoothCalibrationDisplay.from_predictions(y_test, after, name="recalibrated", ax=display.ax_)
display.figure_.savefig("calibration.png", dpi=150)
print("diagram: calibration.png")
