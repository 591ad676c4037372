//! `cargo xtask example model-registry`: the example platform on servers from the rigs, for whoever wants to see it
//! run and try Stillpoint on it. `--down` takes all of it away again.
//!
//! Everything, servers included, lies in `target/model-registry/`.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use stillpoint_testkit::platform::{CACHE_QUERY, TEMPLATE, fill};

use crate::rig::{self, Rig};

/// The application's database, which keeps its name on the server of the copy.
const DATABASE: &str = "model_registry";
/// Buckets of the application and of its copy.
const BUCKETS: [&str; 2] = ["artifacts", "artifacts-staging"];
/// Servers that the platform runs on, by rig and folder.
const SERVERS: [&str; 3] = ["postgres", "redis", "s3"];
/// The folders of those that a restore goes to.
const STAGING_SERVERS: [&str; 2] = ["staging-postgres", "staging-redis"];

/// What to bring up.
#[derive(Debug, clap::Args)]
pub struct ExampleArgs {
    /// Which example: `model-registry`.
    #[arg(value_parser = ["model-registry"])]
    pub name: String,
    /// Stop the application and the servers, and remove their data.
    #[arg(long)]
    pub down: bool,
    /// Versions published per second by the two writers; 0 means as fast as they can.
    #[arg(long, default_value_t = 20.0)]
    pub per_second: f64,
    /// Take `stillpoint` and `model-registry` from this folder, and build nothing.
    #[arg(long, value_name = "FOLDER")]
    pub programs: Option<PathBuf>,
}

/// Brings it up, or down.
pub fn run(root: &Path, args: &ExampleArgs) -> Result<(), String> {
    let target = target(root)?;
    let folder = target.join(&args.name);
    if args.down {
        return down(&folder);
    }
    if folder.join("app.pid").exists() {
        return Err(format!("it is there already; take it down first: cargo xtask example {} --down", args.name));
    }
    // Servers of its own: the rigs that tests share keep what was in them before.
    let mut given = BTreeMap::new();
    for name in SERVERS {
        let rig = Rig::load(root, name)?;
        rig::obtain(&rig, false)?;
        given.extend(rig::up_in(&rig, &folder.join(name))?);
    }
    make_folder(&folder, &given)?;
    // A restore must not go to the server that it came from: the copy gets servers of its own.
    let redis = rig::up_in(&Rig::load(root, "redis")?, &folder.join("staging-redis"))?;
    let postgres = rig::up_in(&Rig::load(root, "postgres")?, &folder.join("staging-postgres"))?;
    let programs = match &args.programs {
        Some(folder) => std::path::absolute(folder).map_err(|error| format!("{}: {error}", folder.display()))?,
        None => build(root, &target)?,
    };
    let started = start(&folder, &given, (&redis, &postgres), &programs, args);
    if let Err(error) = started {
        down(&folder)?;
        return Err(error);
    }
    println!("{}", next_steps(&folder, &programs));
    Ok(())
}

fn target(root: &Path) -> Result<PathBuf, String> {
    let metadata = cargo_metadata::MetadataCommand::new().manifest_path(root.join("Cargo.toml")).no_deps().exec();
    Ok(metadata.map_err(|error| format!("cargo metadata: {error}"))?.target_directory.into_std_path_buf())
}

fn get<'a>(given: &'a BTreeMap<String, String>, name: &str) -> Result<&'a str, String> {
    given.get(name).map(String::as_str).ok_or_else(|| format!("the rig gives no {name}"))
}

/// The port of an address such as `redis://127.0.0.1:7000` or `postgresql://u:p@127.0.0.1:7000/d`.
fn port(address: &str) -> Result<String, String> {
    let host = address.split("://").nth(1).unwrap_or(address).split('/').next().unwrap_or_default();
    host.rsplit(':')
        .next()
        .filter(|port| port.parse::<u16>().is_ok())
        .map(str::to_owned)
        .ok_or(format!("the address `{address}` has no port"))
}

fn make_folder(folder: &Path, given: &BTreeMap<String, String>) -> Result<(), String> {
    for name in ["app", "secrets", "state"] {
        std::fs::create_dir_all(folder.join(name)).map_err(|error| format!("{}: {error}", folder.display()))?;
    }
    let postgres = get(given, "STILLPOINT_RIG_POSTGRES_URL")?;
    let password = postgres.split(':').nth(2).and_then(|rest| rest.split('@').next()).unwrap_or_default();
    let secrets = [
        ("postgres", password),
        ("s3-access-key-id", get(given, "STILLPOINT_RIG_S3_ACCESS_KEY_ID")?),
        ("s3-secret-access-key", get(given, "STILLPOINT_RIG_S3_SECRET_ACCESS_KEY")?),
    ];
    for (name, value) in secrets {
        let path = folder.join("secrets").join(name);
        std::fs::write(&path, value).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok(())
}

/// Released programs are what a newcomer should see.
fn build(root: &Path, target: &Path) -> Result<PathBuf, String> {
    let mut command = crate::test::cargo(root);
    command.args(["build", "--release", "--package", "stillpoint", "--package", "model-registry"]);
    let status = command.status().map_err(|error| format!("cargo cannot be run: {error}"))?;
    if status.success() { Ok(target.join("release")) } else { Err("the programs do not build".to_owned()) }
}

type Given = BTreeMap<String, String>;

fn start(
    folder: &Path,
    given: &Given,
    (staging_redis, staging_postgres): (&Given, &Given),
    programs: &Path,
    args: &ExampleArgs,
) -> Result<(), String> {
    let s3 = get(given, "STILLPOINT_RIG_S3_ENDPOINT")?;
    let place = |side: usize, postgres: &str, redis: &str| {
        let name = ["app", "staging"][side];
        let database = postgres.rsplit_once('/').map_or(postgres, |(server, _)| server);
        Ok::<_, String>(serde_json::json!({
            "postgres": format!("{database}/{}", DATABASE),
            "redis": redis,
            "s3": {
                "endpoint": s3, "bucket": BUCKETS[side],
                "access_key_id": get(given, "STILLPOINT_RIG_S3_ACCESS_KEY_ID")?,
                "secret_access_key": get(given, "STILLPOINT_RIG_S3_SECRET_ACCESS_KEY")?,
            },
            "code": folder.join(name).join("code.git"), "config": folder.join(name).join("config"),
            "record": folder.join("record"), "writers": 2, "per_second": args.per_second,
        }))
    };
    let postgres = get(given, "STILLPOINT_RIG_POSTGRES_URL")?;
    let redis = get(given, "STILLPOINT_RIG_REDIS_URL")?;
    let staged =
        (get(staging_postgres, "STILLPOINT_RIG_POSTGRES_URL")?, get(staging_redis, "STILLPOINT_RIG_REDIS_URL")?);
    let settings = [("app.json", place(0, postgres, redis)?), ("staging.json", place(1, staged.0, staged.1)?)];
    for (name, value) in &settings {
        std::fs::write(folder.join(name), format!("{value:#}\n")).map_err(|error| format!("{name}: {error}"))?;
    }
    let registry = programs.join("model-registry");
    for (task, name) in [("create", "app.json"), ("targets", "staging.json")] {
        let output = Command::new(&registry).arg(task).arg(folder.join(name)).output();
        let output = output.map_err(|error| format!("{}: {error}", registry.display()))?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
        }
    }
    let hooks = serve(folder, &registry)?;
    let values = BTreeMap::from([
        ("folder", folder.display().to_string()),
        ("bucket", folder.join("bucket").display().to_string()),
        ("postgres_port", port(postgres)?),
        ("postgres_database", DATABASE.to_owned()),
        ("redis_port", port(redis)?),
        ("s3_endpoint", s3.to_owned()),
        ("s3_bucket", BUCKETS[0].to_owned()),
        ("hooks", hooks),
        ("cache_query", CACHE_QUERY.to_owned()),
        ("staging_postgres_port", port(staged.0)?),
        ("staging_redis_port", port(staged.1)?),
        ("staging_s3_bucket", BUCKETS[1].to_owned()),
    ]);
    std::fs::write(folder.join("platform.yaml"), fill(TEMPLATE, &values)?)
        .map_err(|error| format!("platform.yaml: {error}"))
}

/// Starts the application in a process group of its own, and returns where its hooks are.
fn serve(folder: &Path, registry: &Path) -> Result<String, String> {
    let failed = |error: std::io::Error| format!("the application: {error}");
    let log = std::fs::File::create(folder.join("app.log")).map_err(failed)?;
    let mut command = Command::new(registry);
    command.arg("serve").arg(folder.join("app.json")).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let mut child = command.spawn().map_err(failed)?;
    std::fs::write(folder.join("app.pid"), child.id().to_string()).map_err(failed)?;
    let mut line = String::new();
    if let Some(output) = child.stdout.take() {
        BufReader::new(output).read_line(&mut line).map_err(failed)?;
    }
    let line = line.trim();
    if line.starts_with("http://") {
        Ok(line.to_owned())
    } else {
        Err(format!("the application did not start; see {}", folder.join("app.log").display()))
    }
}

fn down(folder: &Path) -> Result<(), String> {
    let pid = std::fs::read_to_string(folder.join("app.pid")).ok().and_then(|pid| pid.trim().parse::<u32>().ok());
    let command = |pid: u32| std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    // A number used again is someone else's.
    if let Some(pid) = pid.filter(|pid| String::from_utf8_lossy(&command(*pid)).contains("app.json")) {
        let killed = Command::new("kill").arg(pid.to_string()).status();
        killed.map_err(|error| format!("the application cannot be stopped: {error}"))?;
    }
    for name in SERVERS.iter().chain(&STAGING_SERVERS) {
        rig::down_in(&folder.join(name))?;
    }
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(format!("{}: {error}", folder.display())),
        _ => Ok(()),
    }
}

fn next_steps(folder: &Path, programs: &Path) -> String {
    let (folder, programs) = (folder.display(), programs.display());
    format!(
        "\nthe registry publishes models; its platform is described in {folder}/platform.yaml\n\n\
         cd {folder}\nexport PATH={programs}:$PATH STILLPOINT_STATE={folder}/state\n\n\
         stillpoint init                       makes the bucket and its key\n\
         stillpoint backup                     one recovery point of all five stores\n\
         stillpoint restore --into staging     brings it back beside what is running\n\n\
         then: stillpoint show --json > point.json && model-registry judge staging.json point.json\n\
         down: cargo xtask example model-registry --down"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_found_in_addresses() {
        assert_eq!(port("redis://127.0.0.1:7000"), Ok("7000".to_owned()));
        assert_eq!(port("postgresql://u:p@127.0.0.1:7001/d"), Ok("7001".to_owned()));
        assert!(port("/var/run").is_err());
    }
}
