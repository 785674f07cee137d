"""Forty sensors, two thirds of the readings gone: fill the gaps three ways, and draw one sensor's series."""

import matplotlib
import numpy as np

matplotlib.use("agg")
import matplotlib.pyplot as plt

from planish.graphs import GraphSignalImputer

random = np.random.default_rng(0)
times, places = np.arange(240), random.random((40, 2))
season = (3 + 2 * places[:, 0]) * np.sin(2 * np.pi * times[:, None] / 24 + 2 * places[:, 1])
weather = np.zeros((240, 40))
waves = np.exp(-((places[:, None] - places[None]) ** 2).sum(-1) / 0.1)  # nearby sensors feel the same weather
for t in times[1:]:
    weather[t] = 0.9 * weather[t - 1] + 0.15 * waves @ random.standard_normal(40)
truth = 15 + 5 * places[:, 0] + season + weather
gaps = np.where(random.random(truth.shape) < 0.33, truth + 0.1 * random.standard_normal(truth.shape), np.nan)
gaps[60:85, 0] = np.nan  # one sensor goes silent

figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
axis.plot(times, truth[:, 0], color="#cccccc", linewidth=5, label="truth")
styles = {"linear": ("#777777", ":"), "graphtrss": ("#c1541f", "--"), "prior": ("#2a6f97", "-")}
for method, (colour, style) in styles.items():
    imputer = GraphSignalImputer(method, graph=places, k=6)
    filled = imputer.fit_transform(gaps)
    error = -imputer.score(truth)
    print(f"{method:10} error in the gaps {error:.3f}")
    axis.plot(times, filled[:, 0], color=colour, linestyle=style, label=f"{method}: {error:.2f} over all gaps")
axis.plot(times, gaps[:, 0], "o", color="black", markersize=3.5, label="what the sensor told")
axis.set(xlabel="time", ylabel="one sensor of forty", xlim=(30, 120))
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
figure.savefig("gaps.svg", metadata={"Date": None})
print("picture: gaps.svg")
