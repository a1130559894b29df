//! The kernel's GPIO character devices, by gpiocdev: /dev/gpiochipN of any board.
//!
//! Each line is a request of its own: one that is taken by somebody else, or cannot do what it is asked for, is the fault
//! of its point alone. Tried on a kernel in QEMU (benches/pins), never on real pins.

use std::path::PathBuf;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use gpiocdev::AbiVersion;
use gpiocdev::line::{EdgeDetection, EdgeKind, Value};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;

use super::line::{Bias, Chip, Direction, Edge, Edges, KERNEL_EDGES_MAX, Line, LineId, Trouble, Want};

/// Of 8 bytes: 32 edges of 48 bytes, or (before Linux 5.10) 96 of 16.
const READ_WORDS: usize = 192;

/// A chip by its name (`gpiochip0`), path or label (`pinctrl-bcm2711`); looked for at each request, since a chip on USB
/// comes and goes, and may come back under another name.
pub struct KernelChip {
    chip: String,
    /// The runtime that waits for edges.
    runtime: Handle,
}

enum KernelLine {
    Plain(gpiocdev::Request),
    Watched(AsyncFd<gpiocdev::Request>),
}

impl KernelChip {
    pub fn new(chip: &str, runtime: Handle) -> KernelChip {
        KernelChip {
            chip: chip.to_owned(),
            runtime,
        }
    }

    fn path(&self) -> Result<PathBuf, Trouble> {
        let chip = &self.chip;
        if chip.starts_with('/') {
            return present(PathBuf::from(chip));
        }
        let number = chip.strip_prefix("gpiochip");
        if number.is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit())) {
            return present(PathBuf::from(format!("/dev/{chip}")));
        }
        let mut labels = Vec::new();
        let mut refused = None;
        for path in gpiocdev::chip::chips().unwrap_or_default() {
            match gpiocdev::Chip::from_path(&path).and_then(|c| c.info()) {
                Ok(info) if info.label == *chip => return Ok(path),
                Ok(info) => labels.push(info.label),
                Err(error) => refused = Some(trouble(&path.display().to_string(), &error)),
            }
        }
        Err(match refused {
            Some(Trouble::Chip(why) | Trouble::Line(why) | Trouble::Debounce(why)) => Trouble::Chip(why),
            None if labels.is_empty() => Trouble::Chip(absent("GPIO chip")),
            None => Trouble::Chip(format!(
                "no GPIO chip has the label {chip:?}; there are {}",
                labels.join(", ")
            )),
        })
    }
}

impl Chip for KernelChip {
    fn request(&mut self, want: &Want) -> Result<Arc<dyn Line>, Trouble> {
        let path = self.path()?;
        let of_chip = |error| match trouble(&path.display().to_string(), &error) {
            Trouble::Line(why) | Trouble::Debounce(why) | Trouble::Chip(why) => Trouble::Chip(why),
        };
        let chip = gpiocdev::Chip::from_path(&path).map_err(of_chip)?;
        let offset = match &want.line {
            LineId::Offset(offset) => *offset,
            LineId::Name(name) => named(&chip, name, &path)?,
        };
        let is_v2 = chip.supports_abi_version(AbiVersion::V2).is_ok();
        let mut builder = gpiocdev::Request::builder();
        builder.on_chip(&path).with_consumer("tidegate").with_line(offset);
        let mut is_watched = false;
        match want.direction {
            Direction::In { edges, debounce } => {
                builder.as_input();
                if let Some(edges) = edges {
                    is_watched = true;
                    builder.with_edge_detection(match edges {
                        Edges::Rising => EdgeDetection::RisingEdge,
                        Edges::Falling => EdgeDetection::FallingEdge,
                        Edges::Both => EdgeDetection::BothEdges,
                    });
                    if is_v2 {
                        builder.with_kernel_event_buffer_size(KERNEL_EDGES_MAX);
                    }
                }
                if let Some(period) = debounce {
                    if !is_v2 {
                        let why = "this kernel (before Linux 5.10) has no debounce";
                        return Err(Trouble::Debounce(why.to_owned()));
                    }
                    builder.with_debounce_period(period);
                }
            }
            Direction::Out { level } => {
                builder.as_output(value(level));
            }
        }
        if want.active_low {
            builder.as_active_low();
        }
        if let Some(bias) = want.bias {
            builder.with_bias(match bias {
                Bias::PullUp => gpiocdev::line::Bias::PullUp,
                Bias::PullDown => gpiocdev::line::Bias::PullDown,
                Bias::Disabled => gpiocdev::line::Bias::Disabled,
            });
        }
        let what = format!("{} of {}", want.line, path.display());
        let request = builder.request().map_err(|error| {
            let has_debounce = matches!(want.direction, Direction::In { debounce: Some(_), .. });
            match trouble(&what, &error) {
                Trouble::Line(why) if has_debounce && !is_busy(&error) => Trouble::Debounce(why),
                other => other,
            }
        })?;
        if !is_watched {
            return Ok(Arc::new(KernelLine::Plain(request)));
        }
        let _runtime = self.runtime.enter();
        // SAFETY: a request owns the file that its descriptor is of, closes it when it is dropped and not before, and
        // has no way to exchange it; here it is never given out again.
        match unsafe { AsyncFd::register_with_interest(request, Interest::READABLE) } {
            Ok(fd) => Ok(Arc::new(KernelLine::Watched(fd))),
            Err(error) => Err(Trouble::Line(format!("{what} cannot be waited for: {error}"))),
        }
    }
}

impl KernelLine {
    fn request(&self) -> &gpiocdev::Request {
        match self {
            KernelLine::Plain(request) => request,
            KernelLine::Watched(fd) => fd.get_ref(),
        }
    }
}

impl Line for KernelLine {
    fn get(&self) -> Result<bool, Trouble> {
        let value = self.request().lone_value().map_err(|e| trouble("the line", &e))?;
        Ok(value == Value::Active)
    }

    fn set(&self, level: bool) -> Result<(), Trouble> {
        let set = self.request().set_lone_value(value(level));
        set.map_err(|e| trouble("the line", &e))
    }

    fn poll_edges(&self, cx: &mut Context<'_>, edges: &mut Vec<Edge>) -> Poll<Result<(), Trouble>> {
        let KernelLine::Watched(fd) = self else {
            return Poll::Pending;
        };
        let failed = |e: gpiocdev::Error| trouble("the line", &e);
        loop {
            let guard = ready!(fd.poll_read_ready(cx));
            let mut guard = guard.map_err(|e| Trouble::Line(format!("the line cannot be waited for: {e}")))?;
            let request = fd.get_ref();
            // The descriptor is a blocking one: it is only read where something is there to be read.
            if !request.has_edge_event().map_err(failed)? {
                guard.clear_ready();
                continue;
            }
            let mut words = [0u64; READ_WORDS];
            let read = request.read_edge_events_into_slice(&mut words).map_err(failed)?;
            for event in words[..read].chunks_exact(request.edge_event_u64_size()) {
                let event = request.edge_event_from_slice(event).map_err(failed)?;
                edges.push(Edge {
                    rising: event.kind == EdgeKind::Rising,
                    at_ns: event.timestamp_ns,
                    sequence: event.line_seqno,
                });
            }
            return Poll::Ready(Ok(()));
        }
    }
}

fn value(level: bool) -> Value {
    if level { Value::Active } else { Value::Inactive }
}

/// The offset of the only line with this name.
fn named(chip: &gpiocdev::Chip, name: &str, path: &std::path::Path) -> Result<u32, Trouble> {
    let lines = chip.line_info_iter().map_err(|e| trouble("the chip", &e))?;
    let mut found = lines.filter_map(Result::ok).filter(|line| line.name == name);
    match (found.next(), found.next()) {
        (Some(line), None) => Ok(line.offset),
        (Some(_), Some(_)) => Err(Trouble::Line(format!(
            "two lines of {} have the name {name:?}: write the line's number",
            path.display()
        ))),
        (None, _) => Err(Trouble::Line(format!(
            "no line of {} has the name {name:?} (`gpioinfo` lists them)",
            path.display()
        ))),
    }
}

fn present(path: PathBuf) -> Result<PathBuf, Trouble> {
    match path.exists() {
        true => Ok(path),
        false => Err(Trouble::Chip(absent(&path.display().to_string()))),
    }
}

fn absent(what: &str) -> String {
    format!(
        "no {what} on this host: enable the board's GPIO driver (`gpiodetect` lists its chips), let the service see it \
         (its drop-in gpio.conf), or take this [[connector]] out"
    )
}

fn errno(error: &gpiocdev::Error) -> Option<i32> {
    match error {
        gpiocdev::Error::Os(errno) | gpiocdev::Error::Uapi(_, gpiocdev_uapi::Error::Os(errno)) => Some(errno.0),
        _ => None,
    }
}

fn is_busy(error: &gpiocdev::Error) -> bool {
    errno(error) == Some(libc::EBUSY)
}

/// What went wrong with the chip or the line called `what`, and what to do.
fn trouble(what: &str, error: &gpiocdev::Error) -> Trouble {
    match errno(error) {
        Some(libc::EACCES | libc::EPERM) => Trouble::Chip(format!(
            "no permission for {what}: put the user that tidegate runs as into the group gpio (or the one that \
             `ls -l /dev/gpiochip*` shows)"
        )),
        Some(libc::ENODEV | libc::ENOENT) => Trouble::Chip(format!("{what} is gone: {error}")),
        Some(libc::EBUSY) => Trouble::Line(format!(
            "{what} is in use by another program or a driver (`gpioinfo` says which)"
        )),
        Some(libc::EINVAL) => Trouble::Line(format!("{what} does not exist or cannot be used this way: {error}")),
        Some(libc::ENXIO | libc::EOPNOTSUPP) => Trouble::Line(format!(
            "{what} tells of no edges, or has no such bias: leave out what it cannot do ({error})"
        )),
        _ => Trouble::Line(format!("{what}: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// This runs where there is no GPIO; on a host that has a chip of this name it is not the chip that is meant.
    #[test]
    fn a_host_without_the_chip_says_so() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .expect("a runtime");
        let want = Want {
            line: LineId::Offset(17),
            direction: Direction::Out { level: false },
            active_low: false,
            bias: None,
        };
        for (chip, expected) in [
            ("gpiochip9999", "no /dev/gpiochip9999 on this host: enable"),
            ("/dev/none", "no /dev/none on this host: enable"),
            ("/dev/null", "/dev/null"),
        ] {
            let refused = KernelChip::new(chip, runtime.handle().clone()).request(&want);
            match refused.map(|_| ()) {
                Err(Trouble::Chip(why)) => assert!(why.contains(expected), "{why}"),
                other => panic!("{chip}: {other:?}"),
            }
        }
    }
}
