//! Means with their standard errors, and quantiles. Sums are in f64 and in the order of the samples, so that no
//! figure depends on the number of threads.

/// A mean of independent samples.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Mean {
    pub(super) mean: f64,
    /// Of the mean: the samples' standard deviation over the root of their number; 0 for a single one.
    pub(super) stderr: f64,
}

impl Mean {
    /// Of at least one sample.
    pub(super) fn of(samples: &[f64]) -> Mean {
        // Tokens of a text are exact in f64.
        let n = samples.len() as f64;
        let mean = samples.iter().sum::<f64>() / n;
        let squares: f64 = samples.iter().map(|x| (x - mean) * (x - mean)).sum();
        let stderr = if samples.len() > 1 { (squares / (n - 1.0) / n).sqrt() } else { 0.0 };
        Mean { mean, stderr }
    }

    /// The exponential, with its error to first order.
    pub(super) fn exp(self) -> Mean {
        let mean = self.mean.exp();
        Mean { mean, stderr: mean * self.stderr }
    }
}

/// The `q`-quantile of ascending samples, at least one, interpolated between the two nearest: NumPy's default.
pub(super) fn quantile(sorted: &[f64], q: f64) -> f64 {
    let at = q * (sorted.len() - 1) as f64;
    // A place between 0 and the last sample.
    let (low, high) = (at.floor() as usize, at.ceil() as usize);
    sorted[low] + (sorted[high] - sorted[low]) * at.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means() {
        let check = |samples: &[f64], mean, stderr| assert_eq!(Mean::of(samples), Mean { mean, stderr });
        check(&[5.0], 5.0, 0.0);
        check(&[1.0, 3.0], 2.0, 1.0);
        // Variance 4 over 4 samples.
        check(&[0.0, 2.0, 4.0, 2.0, 2.0, 2.0, 2.0, 2.0], 2.0, (8.0f64 / 7.0 / 8.0).sqrt());
        assert_eq!(Mean { mean: 0.0, stderr: 0.5 }.exp(), Mean { mean: 1.0, stderr: 0.5 });
    }

    #[test]
    fn quantiles() {
        let check = |sorted: &[f64], q, want| assert_eq!(quantile(sorted, q), want, "{sorted:?} {q}");
        check(&[7.0], 0.99, 7.0);
        check(&[1.0, 2.0], 0.5, 1.5);
        check(&[0.0, 10.0, 20.0, 30.0, 40.0], 0.9, 36.0);
        check(&[0.0, 10.0, 20.0], 1.0, 20.0);
    }
}
