//! A side that runs: a device, or a device with a fault planted in it. Knows faults by name and devices by name, and how to
//! bring the two together; what a fault does is not told here.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use model::Model;
use parity::faults::{Misfit, Planted};

use crate::commands::faults::catalogue::{self, Entry};
use crate::commands::faults::kernels::{Edited, KernelFault};
use crate::device::{Device, Placed, Request};
use crate::failure::Failure;

/// What a faulty side is called in front of its fault's name.
pub(crate) const FAULTY: &str = "faulty:";

/// A side that runs: `cpu`, `cuda`, or `faulty:NAME` and `faulty:NAME@DEVICE`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Live {
    pub(crate) device: Device,
    fault: Option<Entry>,
}

impl FromStr for Live {
    type Err = String;

    fn from_str(text: &str) -> Result<Live, String> {
        let Some(faulty) = text.strip_prefix(FAULTY) else {
            let device = text.parse().map_err(|error| format!("{error}, or faulty:NAME"))?;
            return Ok(Live { device, fault: None });
        };
        let (name, device) = match faulty.split_once('@') {
            Some((name, device)) => (name, Some(device.parse()?)),
            None => (faulty, None),
        };
        let fault = catalogue::named(name)?;
        let device = device.unwrap_or(usual_device(&fault));
        if matches!(fault, Entry::Kernel(_)) && !matches!(device, Device::Cuda(_) | Device::Emulated(_)) {
            return Err(format!(
                "`{name}` is in kernels, which {device} has not: {FAULTY}{name}@cuda, or @emulated"
            ));
        }
        Ok(Live { device, fault: Some(fault) })
    }
}

/// Where a fault is planted unless it is said.
fn usual_device(fault: &Entry) -> Device {
    match fault {
        Entry::Planted(_) => Device::Cpu,
        Entry::Kernel(_) => Device::Cuda(0),
    }
}

impl fmt::Display for Live {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.fault {
            None => self.device.fmt(f),
            Some(fault) if self.device == usual_device(fault) => write!(f, "{FAULTY}{}", fault.name()),
            Some(fault) => write!(f, "{FAULTY}{}@{}", fault.name(), self.device),
        }
    }
}

impl Live {
    /// Puts `model` onto the device, with the fault in it if there is one.
    ///
    /// # Errors
    /// The device's; and where the fault would not show: in a model that has not what it is about, or in too few tokens.
    pub(crate) fn place(&self, model: &Arc<Model>, request: Request) -> Result<Placed, Failure> {
        match &self.fault {
            None => request.place_on(model, self.device),
            Some(Entry::Planted(fault)) => self.planted(fault, model, &request),
            Some(Entry::Kernel(fault)) => self.with_kernels(fault, model, request),
        }
    }

    fn planted(&self, fault: &Planted, model: &Arc<Model>, request: &Request) -> Result<Placed, Failure> {
        let fitted = fault.fit(model)?;
        let (needed, given) = (fault.tokens, request.context);
        if given < needed {
            let message = format!(
                "the fault {} shows in {needed} tokens and more, not in {given}: give a longer prompt",
                fault.name
            );
            return Err(Failure::usage(message));
        }
        let mut placed = request.place_on(&fitted.model, self.device)?;
        placed.backend = fitted.around(placed.backend);
        Ok(placed)
    }

    fn with_kernels(
        &self,
        fault: &KernelFault,
        model: &Arc<Model>,
        mut request: Request,
    ) -> Result<Placed, Failure> {
        if request.kernels.sources.is_some() {
            return Err(Failure::usage(format!("{self} has kernels of its own: leave out --kernels")));
        }
        // Read when the backend is made, and not needed any more then.
        let folder = Edited::new()?;
        fault.write(&folder.0).map_err(Failure::new)?;
        request.kernels.sources = Some(folder.0.clone());
        request.place_on(model, self.device)
    }
}

impl From<Misfit> for Failure {
    fn from(misfit: Misfit) -> Failure {
        let fault = misfit.fault;
        Failure::usage(misfit)
            .hint(format!("`tally faults --only {fault} --write-model FILE` writes one that it fits"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_by_name() {
        let check = |text: &str, canonical: &str, device| {
            let live: Live = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!((live.to_string().as_str(), live.device), (canonical, device), "{text}");
        };
        check("cpu", "cpu", Device::Cpu);
        check("oracle", "oracle", Device::Oracle);
        check("faulty:wrong-epsilon", "faulty:wrong-epsilon", Device::Cpu);
        check("faulty:wrong-epsilon@cpu", "faulty:wrong-epsilon", Device::Cpu);
        check("faulty:wrong-epsilon@cuda:1", "faulty:wrong-epsilon@cuda:1", Device::Cuda(1));
        check("faulty:kernel-rotated-backwards", "faulty:kernel-rotated-backwards", Device::Cuda(0));
        check(
            "faulty:kernel-rotated-backwards@emulated",
            "faulty:kernel-rotated-backwards@emulated",
            Device::Emulated(90),
        );
        let refused = |text: &str, why: &str| match text.parse::<Live>() {
            Ok(live) => panic!("{text} is {live}"),
            Err(error) => assert!(error.contains(why), "{text}: {error}"),
        };
        refused("gpu", "faulty:NAME");
        refused("faulty:", "tally faults --list");
        refused("faulty:wrong-epsilom", "`wrong-epsilon`");
        refused("faulty:wrong-epsilon@", "expected cpu");
        refused("faulty:wrong-epsilon@gpu", "expected cpu");
        refused("faulty:kernel-rotated-backwards@cpu", "@emulated");
    }
}
