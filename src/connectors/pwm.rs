//! Kind "pwm": duty cycles in percent, written by commands, on channels of the kernel's PWM chips.
//!
//! A channel is switched on with its safe duty cycle when it is opened (all with the first call), gets it again at the
//! stop and while the uplink it hangs on is lost, and keeps it after the gateway's end.

use std::io;
use std::time::Duration;

use super::Setup;
use super::bus::{BusThread, Hung};
use super::driver::{Driver, Fault, Raw, Sample};
use crate::config::Address;
use crate::config::buses::{PwmChip, PwmPoint};

/// A write is a few files of sysfs; rppal waits up to a second for udev to give them to the group gpio.
const PATIENCE: Duration = Duration::from_secs(3);

/// The driver of one chip.
pub struct Pwm {
    thread: BusThread<Channels>,
    /// By asset and point: the index of its channel.
    places: Vec<Vec<usize>>,
}

/// Opens channels: the kernel's, or in tests others.
trait Chip: Send {
    /// The channel, running with its safe duty cycle.
    fn open(&mut self, point: &PwmPoint) -> Result<Box<dyn Channel>, Fault>;
}

trait Channel: Send {
    /// 0 to 1.
    fn duty(&mut self) -> Result<f64, String>;
    fn set_duty(&mut self, duty: f64) -> Result<(), String>;
}

/// On the thread.
struct Channels {
    chip: Box<dyn Chip>,
    points: Vec<PwmPoint>,
    channels: Vec<Option<Box<dyn Channel>>>,
}

impl Pwm {
    pub fn new(setup: &Setup, settings: &PwmChip) -> Pwm {
        let chip = settings.chip;
        let points = setup.addresses(|address| match address {
            Address::Pwm(point) => Some(*point),
            _ => None,
        });
        Pwm::on(&setup.connector.name, points, move || Box::new(KernelChip(chip)))
    }

    fn on(connector: &str, points: Vec<Vec<PwmPoint>>, chip: impl Fn() -> Box<dyn Chip> + Send + 'static) -> Pwm {
        let mut places = Vec::new();
        let mut count = 0;
        for points in &points {
            places.push((count..count + points.len()).collect());
            count += points.len();
        }
        let points: Vec<PwmPoint> = points.into_iter().flatten().collect();
        let thread = BusThread::new(connector, move || Channels {
            chip: chip(),
            channels: points.iter().map(|_| None).collect(),
            points: points.clone(),
        });
        Pwm { thread, places }
    }

    async fn call<R: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut Channels) -> Result<R, Fault> + Send + 'static,
    ) -> Result<R, Fault> {
        let called = self.thread.call(PATIENCE, |channels| {
            channels.open()?;
            let result = work(channels);
            if let Err(Fault::Line(_)) = result {
                channels.close();
            }
            result
        });
        called.await.unwrap_or_else(|hung| {
            Err(match hung {
                Hung::Now(_) => Fault::Unknown(hung.to_string()),
                Hung::Before(_) | Hung::Ended => Fault::Line(hung.to_string()),
            })
        })
    }
}

impl Driver for Pwm {
    async fn read(&mut self, asset: usize, points: &[usize], samples: &mut Vec<Sample>) -> Result<(), Fault> {
        let indices: Vec<usize> = points.iter().map(|p| self.places[asset][*p]).collect();
        match self.call(move |channels| channels.duties(&indices)).await {
            Ok(duties) => samples.extend(duties.into_iter().map(|duty| Sample::Good(Raw::Float(duty * 100.0)))),
            Err(Fault::Unknown(why)) => return Err(Fault::Line(why)),
            Err(other) => return Err(other),
        }
        Ok(())
    }

    async fn write(&mut self, asset: usize, point: usize, value: &Raw) -> Result<(), Fault> {
        let percent = match value {
            Raw::Float(percent) if (0.0..=100.0).contains(percent) => *percent,
            _ => return Err(Fault::Refused("a duty cycle is 0 to 100 %".to_owned())),
        };
        let index = self.places[asset][point];
        self.call(move |channels| channels.set(index, percent / 100.0)).await
    }

    async fn safe(&mut self) -> Result<(), Fault> {
        self.call(Channels::safe).await
    }
}

impl Channels {
    fn open(&mut self) -> Result<(), Fault> {
        for (channel, point) in self.channels.iter_mut().zip(&self.points) {
            if channel.is_none() {
                *channel = Some(self.chip.open(point)?);
            }
        }
        Ok(())
    }

    fn close(&mut self) {
        self.channels.iter_mut().for_each(|channel| *channel = None);
    }

    fn channel(&mut self, index: usize) -> Result<&mut Box<dyn Channel>, Fault> {
        let closed = || Fault::Line("the channel is not open".to_owned());
        self.channels[index].as_mut().ok_or_else(closed)
    }

    fn duties(&mut self, indices: &[usize]) -> Result<Vec<f64>, Fault> {
        let duty = |index: &usize| self.channel(*index)?.duty().map_err(Fault::Line);
        indices.iter().map(duty).collect()
    }

    fn set(&mut self, index: usize, duty: f64) -> Result<(), Fault> {
        self.channel(index)?.set_duty(duty).map_err(Fault::Line)
    }

    /// All of them; the first error is told.
    fn safe(&mut self) -> Result<(), Fault> {
        let mut result = Ok(());
        for index in 0..self.points.len() {
            let set = self.set(index, safe_duty(&self.points[index]));
            result = result.and(set);
        }
        result
    }
}

/// As with GPIO's lines: whoever lets go of them leaves them safe.
impl Drop for Channels {
    fn drop(&mut self) {
        let _ = self.safe();
    }
}

fn safe_duty(point: &PwmPoint) -> f64 {
    f64::from(point.safe_percent) / 100.0
}

/// /sys/class/pwm/pwmchipN, by rppal; None: the Raspberry Pi's own. Never tried on a real channel.
struct KernelChip(Option<u8>);

impl Chip for KernelChip {
    fn open(&mut self, point: &PwmPoint) -> Result<Box<dyn Channel>, Fault> {
        let what = match self.0 {
            Some(chip) => format!("/sys/class/pwm/pwmchip{chip}"),
            None => "the Raspberry Pi's PWM".to_owned(),
        };
        self.channel(point)
            .map(|pwm| Box::new(pwm) as Box<dyn Channel>)
            .map_err(|error| Fault::Line(cannot_open(&what, point.channel, &error)))
    }
}

impl KernelChip {
    fn channel(&self, point: &PwmPoint) -> rppal::pwm::Result<rppal::pwm::Pwm> {
        use rppal::pwm::{Channel, Error, Polarity};
        let mut pwm = match self.0 {
            Some(chip) => rppal::pwm::Pwm::with_pwmchip(chip, point.channel)?,
            None => {
                let channels = [Channel::Pwm0, Channel::Pwm1, Channel::Pwm2, Channel::Pwm3];
                let channel = channels.get(usize::from(point.channel)).ok_or(Error::InvalidChannel)?;
                rppal::pwm::Pwm::new(*channel)?
            }
        };
        // The safe duty cycle outlives the gateway.
        pwm.set_reset_on_drop(false);
        // The pulse may never be longer than the period, and the polarity is fixed while the channel runs.
        pwm.set_pulse_width(Duration::ZERO).or_else(|error| match error {
            // A channel that never had a period refuses that.
            Error::Io(e) if e.kind() == io::ErrorKind::InvalidInput => Ok(()),
            other => Err(other),
        })?;
        pwm.set_period(point.period)?;
        let polarity = if point.inverted {
            Polarity::Inverse
        } else {
            Polarity::Normal
        };
        if pwm.polarity()? != polarity {
            pwm.set_polarity(polarity)?;
        }
        pwm.set_duty_cycle(safe_duty(point))?;
        pwm.enable()?;
        Ok(pwm)
    }
}

impl Channel for rppal::pwm::Pwm {
    fn duty(&mut self) -> Result<f64, String> {
        self.duty_cycle().map_err(|e| e.to_string())
    }

    fn set_duty(&mut self, duty: f64) -> Result<(), String> {
        self.set_duty_cycle(duty).map_err(|e| e.to_string())
    }
}

fn cannot_open(what: &str, channel: u8, error: &rppal::pwm::Error) -> String {
    use rppal::pwm::Error;
    match error {
        Error::UnknownModel => "this board is no Raspberry Pi that is known: say which PWM chip with chip = 0 \
                                (`ls /sys/class/pwm`)"
            .to_owned(),
        Error::Io(error) if error.kind() == io::ErrorKind::NotFound => format!(
            "no {what} on this host: enable it (on a Raspberry Pi dtoverlay=pwm in config.txt; `ls /sys/class/pwm` \
             lists the chips), or take this [[connector]] out"
        ),
        Error::Io(error) if error.kind() == io::ErrorKind::PermissionDenied => format!(
            "no permission for {what}: the user that tidegate runs as must be able to write there (group gpio with \
             Raspberry Pi OS's udev rules)"
        ),
        other => format!("channel {channel} of {what} cannot be used: {other}"),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// Channels in memory: the duty cycle of each, and whether they can be reached.
    #[derive(Clone, Default)]
    struct Memory(Arc<Mutex<(Vec<Option<f64>>, bool)>>);

    impl Chip for Memory {
        fn open(&mut self, point: &PwmPoint) -> Result<Box<dyn Channel>, Fault> {
            let mut state = self.0.lock().expect("no panic");
            if state.1 {
                return Err(Fault::Line("gone".to_owned()));
            }
            let channel = usize::from(point.channel);
            state.0.resize(2, None);
            state.0[channel] = Some(safe_duty(point));
            Ok(Box::new((self.clone(), channel)))
        }
    }

    impl Channel for (Memory, usize) {
        fn duty(&mut self) -> Result<f64, String> {
            let state = self.0.0.lock().expect("no panic");
            if state.1 {
                Err("gone".to_owned())
            } else {
                state.0[self.1].ok_or("closed".to_owned())
            }
        }

        fn set_duty(&mut self, duty: f64) -> Result<(), String> {
            let mut state = self.0.0.lock().expect("no panic");
            if state.1 {
                return Err("gone".to_owned());
            }
            state.0[self.1] = Some(duty);
            Ok(())
        }
    }

    fn point(channel: u8, safe_percent: u8) -> PwmPoint {
        PwmPoint {
            channel,
            period: Duration::from_millis(1),
            safe_percent,
            inverted: false,
        }
    }

    fn block_on<F: Future>(future: F) -> F::Output {
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("a runtime")
            .block_on(future)
    }

    #[test]
    fn duties_are_safe_at_the_start_written_by_commands_and_safe_again() {
        block_on(async {
            let memory = Memory::default();
            let chip = memory.clone();
            let duties = || memory.0.lock().expect("no panic").0.clone();
            let mut pwm = Pwm::on("pwm", vec![vec![point(1, 20)], vec![point(0, 0)]], move || {
                Box::new(chip.clone())
            });
            let mut samples = Vec::new();
            pwm.read(0, &[0], &mut samples).await.expect("readable");
            assert_eq!(samples, [Sample::Good(Raw::Float(20.0))]);
            assert_eq!(duties(), [Some(0.0), Some(0.2)], "all of them are open");
            pwm.write(1, 0, &Raw::Float(75.0)).await.expect("writable");
            for wrong in [
                Raw::Float(100.1),
                Raw::Float(-0.1),
                Raw::Float(f64::NAN),
                Raw::Bool(true),
            ] {
                let refused = pwm.write(1, 0, &wrong).await;
                assert!(matches!(refused, Err(Fault::Refused(_))), "{wrong:?}: {refused:?}");
            }
            assert_eq!(duties(), [Some(0.75), Some(0.2)]);
            pwm.safe().await.expect("reachable");
            assert_eq!(duties(), [Some(0.0), Some(0.2)]);
        });
    }

    #[test]
    fn a_chip_that_comes_back_starts_safe() {
        block_on(async {
            let memory = Memory::default();
            let chip = memory.clone();
            let mut pwm = Pwm::on("pwm", vec![vec![point(0, 10)]], move || Box::new(chip.clone()));
            pwm.write(0, 0, &Raw::Float(80.0)).await.expect("writable");
            memory.0.lock().expect("no panic").1 = true;
            for _ in 0..2 {
                let mut samples = Vec::new();
                assert_eq!(
                    pwm.read(0, &[0], &mut samples).await,
                    Err(Fault::Line("gone".to_owned()))
                );
            }
            memory.0.lock().expect("no panic").1 = false;
            let mut samples = Vec::new();
            pwm.read(0, &[0], &mut samples).await.expect("it is back");
            assert_eq!(samples, [Sample::Good(Raw::Float(10.0))]);
        });
    }

    #[test]
    fn a_host_without_pwm_says_so() {
        block_on(async {
            // Chip 250 is nowhere; a build machine is no Raspberry Pi.
            for (chip, expected) in [
                (Some(250), "no /sys/class/pwm/pwmchip250 on this host"),
                (None, "no Raspberry Pi"),
            ] {
                let mut pwm = Pwm::on("pwm", vec![vec![point(0, 0)]], move || Box::new(KernelChip(chip)));
                let refused = pwm.safe().await;
                assert!(
                    matches!(&refused, Err(Fault::Line(why)) if why.contains(expected)),
                    "{refused:?}"
                );
            }
        });
    }
}
