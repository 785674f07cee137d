"""How does the whole distribution of a target move with a feature? Quantiles, an interval that is kept, and the fan."""

import numpy as np
from sklearn.model_selection import train_test_split

from planish.regression import QuantileFanDisplay, QuantileProcessRegressor

random = np.random.default_rng(0)
x = random.random((900, 1))
y = 2 * x[:, 0] * np.sin(4 * np.pi * x[:, 0]) + np.sin(np.pi * x[:, 0]) * random.standard_normal(900)
x, x_test, y, y_test = train_test_split(x, y, test_size=200, random_state=0)
x, x_own, y, y_own = train_test_split(x, y, test_size=200, random_state=0)  # for intervals that keep their promise

model = QuantileProcessRegressor(hidden_layer_sizes=(32, 32), max_iter=300, learning_rate_init=5e-3, random_state=0)
model.fit(x, y).conformalize(x_own, y_own)

print("levels      ", [0.05, 0.5, 0.95])
print("at x = 0.5  ", model.predict([[0.5]], quantiles=[0.05, 0.5, 0.95]).round(2)[0], "true: -1.64, 0, 1.64")
print("CRPS        ", round(model.crps(x_test, y_test), 3), " crossings:", model.crossing_rate(x_test))
for conformal in (False, True):
    low, high = model.predict_interval(x_test, 0.9, conformal=conformal).T
    print(f"90 % interval, conformal={conformal}: holds {np.mean((low <= y_test) & (y_test <= high)):.0%} of new rows")

display = QuantileFanDisplay.from_estimator(model, x, y, feature_name="x")
display.figure_.savefig("fan.png", dpi=150)
print("fan: fan.png")
