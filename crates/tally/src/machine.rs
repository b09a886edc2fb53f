//! What this machine is and what this process takes of it, as Linux tells in /proc and /sys. Any answer may be
//! missing elsewhere; none is needed to compute.

use std::collections::BTreeMap;
use std::fs;

/// The processor's name, such as `AMD EPYC`.
pub(crate) fn processor() -> Option<String> {
    field(&fs::read_to_string("/proc/cpuinfo").ok()?, "model name").map(str::to_owned)
}

/// The bytes of all last-level caches together.
pub(crate) fn last_level_cache() -> Option<usize> {
    let mut level_and_caches = (0, BTreeMap::new());
    for cpu in fs::read_dir("/sys/devices/system/cpu").ok()?.flatten() {
        let Ok(caches) = fs::read_dir(cpu.path().join("cache")) else { continue };
        for cache in caches.flatten() {
            let read = |name| fs::read_to_string(cache.path().join(name)).ok();
            let (Some(level), Some(size), Some(cpus)) =
                (read("level"), read("size"), read("shared_cpu_list"))
            else {
                continue;
            };
            let (Ok(level), Some(size)) = (level.trim().parse::<u32>(), kibibytes(&size)) else { continue };
            if level > level_and_caches.0 {
                level_and_caches = (level, BTreeMap::new());
            }
            if level == level_and_caches.0 {
                // Cores that share a cache each list it.
                level_and_caches.1.insert(cpus, size);
            }
        }
    }
    Some(level_and_caches.1.into_values().sum()).filter(|&bytes| bytes > 0)
}

/// The most memory that this process ever had resident, in bytes: its own allocations and the pages of mapped files
/// that it touched, weights among them. `VmHWM` of proc(5).
pub(crate) fn peak_resident_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    kibibytes(field(&status, "VmHWM")?).map(|bytes| bytes as u64) // `usize` is at most 64 bits wide
}

/// [`peak_resident_bytes`], from which measurements' own buffers can be left out.
#[derive(Default)]
pub(crate) struct Peak {
    /// Before what was left out.
    earlier: u64,
    /// Whether something that should not count may count all the same.
    inflated: bool,
}

impl Peak {
    /// Runs `work`, whose memory is given back when it returns and shall not count.
    pub(crate) fn without<T>(&mut self, work: impl FnOnce() -> T) -> T {
        self.earlier = self.earlier.max(peak_resident_bytes().unwrap_or(0));
        let result = work();
        // proc(5): sets the mark back to what is resident now.
        self.inflated |= fs::write("/proc/self/clear_refs", "5").is_err();
        result
    }

    /// The bytes, unless the system does not tell.
    pub(crate) fn bytes(&self) -> Option<u64> {
        if self.inflated { None } else { Some(self.earlier.max(peak_resident_bytes()?)) }
    }
}

/// The value on the line `name : value` of a file in /proc.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    lines.into_iter().find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim())
}

/// `1024 kB` and `1024K` in bytes.
fn kibibytes(text: &str) -> Option<usize> {
    let digits = text.trim().trim_end_matches(|c: char| !c.is_ascii_digit());
    digits.parse::<usize>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_and_sizes() {
        let check = |text, name, want| assert_eq!(field(text, name).and_then(kibibytes), want, "{text:?}");
        check("VmPeak:\t    3776 kB\nVmHWM:\t    2068 kB\n", "VmHWM", Some(2068 * 1024));
        check("VmHWM: 32768K", "VmHWM", Some(32 << 20));
        check("VmHWM: lots", "VmHWM", None);
        check("", "VmHWM", None);
    }
    #[test]
    #[cfg(target_os = "linux")]
    fn peak_memory_grows_with_use() {
        let before = peak_resident_bytes().expect("proc is mounted");
        let touched = std::hint::black_box(vec![1u8; 256 << 20]);
        let after = peak_resident_bytes().expect("proc is mounted");
        // Other tests run and end beside this one: half of it is proof enough.
        assert!(after - before >= touched.len() as u64 / 2, "{before} to {after}");
    }
}
